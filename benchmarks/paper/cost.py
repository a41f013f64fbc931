"""How long a step takes on the paper's machines: a roofline and a few constants, each from one stated point.

    step = max(weights / bandwidth, FLOPs / peak)           matrix products, over all tokens of the step
         + KV bytes / bandwidth                             attention of decoding sequences
         + all-reduces                                      tensor parallel models
         + host: per step, per group, per sequence          Python scheduler and sampler of the authors' artefact

This is a model, not a measurement. Nothing in it knows a memory manager; all systems but FasterTransformer share the
constants, as they share kernels and engine in the paper.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    bandwidth: float
    """Bytes/s of its memory."""
    flops: float
    """FLOP/s, half precision, dense."""
    link: float
    """Bytes/s to the other GPUs, one direction."""


A100_40GB = Gpu(1.555e12, 312e12, 300e9)
A100_80GB = Gpu(2.039e12, 312e12, 300e9)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on its machine (paper, table 1)."""

    layers: int
    hidden: int
    vocab: int
    gpu: Gpu
    num_gpus: int
    slots: int
    """Token slots of the KV pool."""
    ft_batch: dict[str, int]
    """Sequences that fit FasterTransformer's batch, by data set (from the artefact)."""

    @property
    def parameters(self) -> float:
        return 12 * self.layers * self.hidden**2 + self.vocab * self.hidden

    @property
    def kv_bytes(self) -> float:
        """Of one token, over all layers and GPUs."""
        return 2 * 2 * self.layers * self.hidden


MODELS = {
    "opt-13b": Model(40, 5120, 50272, A100_40GB, 1, 15_728, {"sharegpt": 5, "alpaca": 14}),
    "opt-66b": Model(64, 9216, 50272, A100_40GB, 4, 9_700, {"sharegpt": 2, "alpaca": 8}),
    "opt-175b": Model(96, 12288, 50272, A100_80GB, 8, 60_100, {"sharegpt": 24, "alpaca": 80}),
    "llama-13b": Model(40, 5120, 32000, A100_40GB, 1, 15_728, {}),
}


@dataclasses.dataclass(frozen=True)
class Software:
    """What an engine makes of the hardware."""

    weights: float = 0.893
    """Share of the bandwidth when weights are read. FasterTransformer's own log in the artefact (OPT-13B, 102 batches)
    is 18.5 ms a step + 0.57 ms per 1,000 cached tokens to 0.5 %: 25.7 GB in 18.5 ms."""
    kv: float = 0.757
    """Share of the bandwidth when blocks are read: FasterTransformer's by the same log, 0.931, over 1.23; the paper has
    20 to 26 % between their attention kernels."""
    matmul: float = 0.657
    """Share of the peak in compute-bound products. Figure 19a: 256 tokens recomputed in 37.5 / 0.9 ms, host included
    (the released script multiplies by 0.9)."""
    host_step: float = 9.3e-3
    """Seconds a step. Figure 12a, vLLM at 1 req/s: 0.037 s/token."""
    host_group: float = 0.2e-3
    """Seconds for each request that is sampled from. Its share of the two: figure 14, vLLM, n = 6."""
    host_sequence: float = 0.12e-3
    """Seconds for each sequence that is sampled from. Both together: figure 12d, vLLM's capacity."""
    all_reduce: float = 30e-6
    """Seconds of latency of one of a layer's two all-reduces; a usual value for NVLink."""
    remote_step: float = 10e-3
    """Seconds a step for calling the workers of a tensor parallel model (Ray). Figure 12b, vLLM's capacity."""
    remote_sequence: float = 0.13e-3
    """The same for each sequence. Figure 12e, vLLM's capacity."""


VLLM_2023 = Software()
FASTER_TRANSFORMER = dataclasses.replace(
    VLLM_2023, kv=0.931, host_step=0.0, host_group=0.0, host_sequence=0.0, remote_step=0.0, remote_sequence=0.0
)
"""C++: what its log tells, and no host."""

PCIE_BANDWIDTH = 2 * 256 * 819_200 / 33.4e-3
"""Bytes/s. Figure 19a: 256 tokens of OPT-13B out and in, in one block: 33.4 ms."""
PCIE_COPY = (137e-3 - 33.4e-3) / (2 * 255 * 40 * 2)
"""Seconds of each copy beside its bytes. Figure 19a, blocks of 1: 40 layers, K and V apart, out and in."""


@dataclasses.dataclass(slots=True)
class Work:
    """What one step does."""

    decodes: int = 0
    """Sequences in the decode lane."""
    context: int = 0
    """Cached tokens that they attend to, their own included."""
    prompt: int = 0
    """Tokens in the prefill lane."""
    pairs: float = 0.0
    """Query-key pairs of the prefill lane."""
    samples: int = 0
    """Sequences that get a token."""
    groups: int = 0
    """Requests that they belong to."""
    copied: int = 0
    """Blocks copied on the device."""
    swapped: int = 0
    """Blocks moved to or from the host."""


class CostModel:
    """Seconds of a step of one model with one engine."""

    def __init__(self, model: Model, software: Software = VLLM_2023, *, block_size: int = 16) -> None:
        gpu, n = model.gpu, model.num_gpus
        self.model, self.software, self.block_size = model, software, block_size
        self._weights = 2 * model.parameters / n / (gpu.bandwidth * software.weights)
        self._flop = 2 * model.parameters / n / (gpu.flops * software.matmul)
        self._pair = 4 * model.layers * model.hidden / n / (gpu.flops * software.matmul)
        self._kv = model.kv_bytes / n / (gpu.bandwidth * software.kv)
        self._copy = 2 * block_size * model.kv_bytes / n / gpu.bandwidth
        reduces = 2 * model.layers if n > 1 else 0
        self._step = software.host_step + reduces * software.all_reduce + (software.remote_step if n > 1 else 0)
        self._sequence = software.host_sequence + (software.remote_sequence if n > 1 else 0)
        self._reduce_token = reduces * 2 * model.hidden * 2 * (n - 1) / n / gpu.link
        self._swap = self.swap(block_size, 1)

    def step(self, work: Work) -> float:
        tokens = work.decodes + work.prompt
        return (
            max(self._weights, tokens * self._flop)
            + work.pairs * self._pair
            + work.context * self._kv
            + tokens * self._reduce_token
            + self._step
            + work.groups * self.software.host_group
            + work.samples * self._sequence
            + work.copied * self._copy
            + work.swapped * self._swap
        )

    def swap(self, tokens: int, directions: int = 2) -> float:
        """Seconds to move so many tokens' blocks over PCIe; each GPU moves its part, layer by layer, K and V apart."""
        blocks = -(-tokens // self.block_size)
        copies = directions * blocks * self.model.layers * 2
        size = directions * blocks * self.block_size * self.model.kv_bytes / self.model.num_gpus
        return copies * PCIE_COPY + size / PCIE_BANDWIDTH

    def recompute(self, tokens: int) -> float:
        """Seconds of a step that computes so many tokens of one sequence."""
        return self.step(Work(prompt=tokens, pairs=tokens**2 / 2, samples=1, groups=1))
