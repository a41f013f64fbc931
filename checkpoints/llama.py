"""The parameter tree of the Llama family, and what its leaves are called in other people's files.

    embed_tokens/embedding [V, E]
    layers_{i}/input_layernorm/scale [E]
    layers_{i}/self_attn/{q,k,v,o}_proj/kernel [in, out]   (and bias [out])
    layers_{i}/post_attention_layernorm/scale [E]
    layers_{i}/mlp/{gate,up,down}_proj/kernel [in, out]    (and bias [out])
    norm/scale [E]
    lm_head/kernel [E, V]                                  (absent if tied to the embedding)

Kernels are stored [out, in] by everybody else. q and k follow the half-rotation convention of RoPE.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import Progress, Task, aligned_arrays, run_tasks
from checkpoints.errors import MissingWeightsError
from jpaged.models.config import ModelConfig


@dataclass(frozen=True)
class Leaf:
    """One parameter."""

    path: tuple[str, ...]
    """Where it is in our tree."""

    shape: tuple[int, ...]
    """Shape in our tree."""

    hf: str
    """Name in a Hugging Face checkpoint."""

    gguf: str
    """Name in a GGUF file."""

    rotary_heads: int = 0
    """Number of heads if this is a q or k projection, whose outputs are rotated; 0 otherwise."""

    @property
    def transposed(self) -> bool:
        """True if files hold the transpose."""
        return self.path[-1] == "kernel"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in files."""
        return self.shape[::-1] if self.transposed else self.shape


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """Every parameter that a model of this configuration has, in order of use."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Leaf(("embed_tokens", "embedding"), (vocab, hidden), "model.embed_tokens.weight", "token_embd.weight")
    for index in range(config.num_hidden_layers):
        yield from _layer(config, index)
    yield Leaf(("norm", "scale"), (hidden,), "model.norm.weight", "output_norm.weight")
    if not config.tie_word_embeddings:
        yield Leaf(("lm_head", "kernel"), (hidden, vocab), "lm_head.weight", "output.weight")


def _layer(config: ModelConfig, index: int) -> Iterator[Leaf]:
    hidden, width, heads, kv_heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    queries, keys = heads * config.head_dim, kv_heads * config.head_dim
    attention = [  # module, GGUF's name, in, out, heads that RoPE rotates
        ("q_proj", "attn_q", hidden, queries, heads),
        ("k_proj", "attn_k", hidden, keys, kv_heads),
        ("v_proj", "attn_v", hidden, keys, 0),
        ("o_proj", "attn_output", queries, hidden, 0),
    ]
    mlp = [
        ("gate_proj", "ffn_gate", hidden, width, 0),
        ("up_proj", "ffn_up", hidden, width, 0),
        ("down_proj", "ffn_down", width, hidden, 0),
    ]
    yield _norm(index, "input_layernorm", "attn_norm", hidden)
    yield from _projections(index, "self_attn", attention, config.attention_bias)
    yield _norm(index, "post_attention_layernorm", "ffn_norm", hidden)
    yield from _projections(index, "mlp", mlp, config.mlp_bias)


def _norm(index: int, module: str, gguf: str, hidden: int) -> Leaf:
    return Leaf(
        (f"layers_{index}", module, "scale"),
        (hidden,),
        f"model.layers.{index}.{module}.weight",
        f"blk.{index}.{gguf}.weight",
    )


def _projections(index: int, block: str, rows: Iterable[tuple[str, str, int, int, int]], bias: bool) -> Iterator[Leaf]:
    for module, gguf, fan_in, fan_out, rotary_heads in rows:
        path = (f"layers_{index}", block, module)
        hf, ggml = f"model.layers.{index}.{block}.{module}", f"blk.{index}.{gguf}"
        yield Leaf((*path, "kernel"), (fan_in, fan_out), f"{hf}.weight", f"{ggml}.weight", rotary_heads)
        if bias:
            yield Leaf((*path, "bias"), (fan_out,), f"{hf}.bias", f"{ggml}.bias", rotary_heads)


def read_params(
    config: ModelConfig,
    dtype: np.dtype,
    tasks_of: Callable[[Leaf, NDArray], Iterable[Task]],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Allocates all parameters and fills them.

    Args:
        config: the model.
        dtype: element type of every leaf.
        tasks_of: given a leaf and its array, the tasks that fill the array from a checkpoint.
        progress: see `checkpoints.arrays.Progress`.

    Returns:
        The tree described above. Its arrays are read-only, for JAX may share their memory.
    """
    wanted = list(leaves(config))
    arrays = aligned_arrays((leaf.shape for leaf in wanted), dtype)
    run_tasks([task for leaf, array in zip(wanted, arrays, strict=True) for task in tasks_of(leaf, array)], progress)
    params: dict[str, Any] = {}
    for leaf, array in zip(wanted, arrays, strict=True):
        array.flags.writeable = False
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
    return params


def check_tensors(source: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; raises `MissingWeightsError` with every difference."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    misshapen = [
        (name, shape, found[name]) for name, shape in expected.items() if name in found and found[name] != shape
    ]
    if missing or surplus or misshapen:
        raise MissingWeightsError(source, missing=missing, surplus=surplus, misshapen=misshapen)
