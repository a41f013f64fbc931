"""EngineConfig: every argument of the engine, in one frozen dataclass. The CLI's flags and help come from here."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from jpaged.errors import InvalidConfigError

SMALLEST_TILE = 16
"""Tokens of a tile that nobody has asked for, at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Speculative decoding by prompt lookup: a sequence may go on as it did where its last tokens stood before.

    Raises:
      InvalidConfigError: a value is out of range, or unknown.
    """

    num_speculative_tokens: int
    """Most tokens that are guessed at a time; each takes a lane of the step that a sequence could have."""
    method: Literal["ngram"] = "ngram"
    prompt_lookup_max: int = 4
    """The longest run of last tokens that is looked for."""
    prompt_lookup_min: int = 2
    """The shortest."""

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise InvalidConfigError(f"speculative_config: method={self.method!r} is not offered; there is 'ngram'.")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
                raise InvalidConfigError(f"speculative_config: {name}={value!r} must be an integer from 1 to 64.")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InvalidConfigError("speculative_config: prompt_lookup_min is above prompt_lookup_max.")

    @classmethod
    def of(cls, given: "SpeculativeConfig | Mapping[str, Any] | str") -> "SpeculativeConfig":
        """From a mapping of the fields, or from that as JSON."""
        if isinstance(given, cls):
            return given
        try:
            return cls(**(json.loads(given) if isinstance(given, str) else given))  # type: ignore[arg-type]
        except InvalidConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise InvalidConfigError(
                f'speculative_config: {error}; it takes, say, {{"method": "ngram", "num_speculative_tokens": 7}}.'
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Arguments of `LLM` and `LLMEngine`. Names are vLLM's where vLLM has the thing.

    Raises:
      InvalidConfigError: a value is out of range.
    """

    model: str = "smollm2-135m"
    """A short name (smollm2-135m), a .gguf file, a Hugging Face folder, or a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of another tokenizer; None: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and computation. auto: float32 on CPU, bfloat16 on GPU; live parameters are served as they are."""
    batch_invariant: bool = False
    """Each token's logits are the same bits in any batch, and those of the training forward pass; it costs speed."""
    tensor_parallel_size: int = 1
    """Devices that share each layer's weights and KV heads; it divides the model's attention heads."""
    seed: int = 0
    """Root of the random keys of requests that bring no seed of their own."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt included; None: the model's own, but at most 8192."""
    max_num_seqs: int | None = None
    """Most sequences running at once; None: 32 on CPU, 256 on GPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None: max_num_seqs plus 512 (CPU) or 2048 (GPU). Smaller: shorter waits for tokens."""
    block_size: int = 16
    """Tokens of one KV cache block."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Of keys and values. auto: dtype. int8 and fp8 (e4m3) take half of bfloat16's memory; see docs/kernels.md."""
    num_gpu_blocks_override: int | None = None
    """Blocks of the pool (on whatever device), instead of a memory budget."""
    kv_cache_memory_bytes: int | None = None
    """Bytes for the KV cache on each device; None: see gpu_memory_utilization (GPU), or at most 1 GiB (CPU)."""
    gpu_memory_utilization: float = 0.92
    """Share of each GPU's memory for weights, step and KV cache together."""
    enable_prefix_caching: bool = True
    """Keep full blocks after use and share them between requests that begin alike."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """fcfs: by arrival. priority: by the request's priority (smaller first), then by arrival."""
    swap_space: float = 4.0
    """GiB of host memory for the blocks of preempted requests (less if the machine has less); 0: none."""
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    """What becomes of the keys and values of a request that must make room. auto: one sequence's are computed again
    later, those of several (n, beams) are swapped to host memory; computed again, too, if there is no room."""
    watermark: float = 0.01
    """Share of the blocks that admission leaves free."""
    prefill_tile_size: int | None = None
    """Tokens of one tile: prompts are computed in pieces of this size, several in one step. None: 16 on CPU; on GPU 64,
    or 128 where no heads share keys, which fills tensor cores."""
    speculative_config: SpeculativeConfig | dict[str, Any] | str | None = None
    """Guess tokens and check several in one step: {"method": "ngram", "num_speculative_tokens": 7}, also as JSON.
    Changes the speed and nothing else; pays for few sequences whose text repeats itself, or their prompt."""
    warmup: bool = True
    """Compile every step shape before the first request; False: each when it is first needed."""
    compilation_cache_dir: str | None = None
    """Where compiled steps are kept between starts; None: the user's cache folder; "": nowhere."""

    def __post_init__(self) -> None:
        if self.speculative_config is not None:
            speculative = SpeculativeConfig.of(self.speculative_config)
            object.__setattr__(self, "speculative_config", speculative)  # __post_init__ of a frozen dataclass
        self._at_least(
            1,
            "block_size",
            "tensor_parallel_size",
            "prefill_tile_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
        )
        self._at_least(2, "num_gpu_blocks_override")
        bounds = (("gpu_memory_utilization", 0.0, 1.0), ("watermark", -1e-9, 0.5), ("swap_space", -1e-9, 1e6))
        for name, low, high in bounds:
            if not low < getattr(self, name) <= high:
                raise InvalidConfigError(
                    f"{name}={getattr(self, name)!r} must be above {max(low, 0):g} and at most {high:g}."
                )
        tile = self.prefill_tile_size or SMALLEST_TILE
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < tile:
            raise InvalidConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below "
                f"prefill_tile_size={tile}: no prompt could be computed."
            )
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16")),
            ("kv_cache_dtype", ("auto", "int8", "fp8")),
            ("scheduling_policy", ("fcfs", "priority")),
            ("preemption_mode", ("auto", "swap", "recompute")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")

        if self.batch_invariant and self.tensor_parallel_size > 1:
            raise InvalidConfigError(
                "batch_invariant needs tensor_parallel_size=1: devices add in an order of their own."
            )
        if self.batch_invariant and self.kv_cache_dtype != "auto":
            raise InvalidConfigError('batch_invariant needs kv_cache_dtype="auto": training has no rounded keys.')

    def _at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise InvalidConfigError(f"{name}={value!r} must be an integer of at least {low}.")
