"""A Llama-family GGUF file -> `ModelConfig` and parameter tree."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import TILE, Progress, Task, copy_cast, expand
from checkpoints.errors import CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile, GGUFTensor
from checkpoints.leaves import Leaf, check_tensors, read_params
from checkpoints.tables import leaves_of
from jpaged.models.config import ModelConfig, config_from_hf

SUPPORTED_ARCHITECTURES = ("llama",)
"""Values of `general.architecture`; llama.cpp files Mistral under "llama" too."""

_ROPE_DIVISORS = "rope_freqs.weight"

_MODULES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
"""Our name of a module -> llama.cpp's."""


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads the model's configuration from a GGUF file's metadata.

    Raises:
        UnsupportedCheckpointError: another architecture, or a feature of it that jpaged does not implement.
        ModelConfigError: metadata that is missing or out of range.
    """
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    get = partial(_scalar, file, arch)
    if get("expert_count"):
        raise UnsupportedCheckpointError(f"{file.path}: mixture-of-experts models are not supported; use a dense one")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    derived = hidden // heads if _positive(heads) and _positive(hidden) else None
    head_dim = get("attention.key_length", derived)
    if get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedCheckpointError(f"{file.path}: keys and values of different widths are not supported")
    embedding = file.tensors.get("token_embd.weight")
    return config_from_hf(
        {
            "model_type": arch,
            "vocab_size": embedding.shape[0] if embedding else get("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "sliding_window": get("attention.sliding_window") or None,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
            "rope_parameters": _rope(file, partial(_scalar, file, f"{arch}.rope"), get("context_length"), head_dim),
            "bos_token_id": _scalar(file, "tokenizer.ggml", "bos_token_id"),
            "eos_token_id": _end_tokens(file),
            "pad_token_id": _scalar(file, "tokenizer.ggml", "padding_token_id"),
        }
    )


def params_from_gguf(
    file: GGUFFile, config: ModelConfig, dtype: np.dtype, progress: Progress | None = None
) -> dict[str, Any]:
    """Dequantises, transposes and casts all tensors into the tree of `checkpoints.tables`.

    Returns:
        Nested dict of C-contiguous arrays of `dtype`, aligned to 64 bytes.

    Raises:
        MissingWeightsError: the file's tensors are not those that `config` asks for.
        UnsupportedCheckpointError: a quantised norm or bias.
    """
    wanted = list(leaves_of(config))
    check_tensors(
        str(file.path),
        {gguf_name(leaf.path): leaf.stored_shape for leaf in wanted},
        {name: tensor.shape for name, tensor in file.tensors.items() if name != _ROPE_DIVISORS},
    )
    return read_params(wanted, dtype, partial(_tasks, file, config), progress)


def gguf_name(path: tuple[str, ...]) -> str:
    """llama.cpp's name of a leaf of our tree."""
    block = f"blk.{path[0].removeprefix('layers_')}." if path[0].startswith("layers_") else ""
    kind = "bias" if path[-1] == "bias" else "weight"
    return f"{block}{_MODULES[path[-2]]}.{kind}"


def half_rotation_order(heads: int, width: int) -> NDArray[np.intp]:
    """Which row of llama.cpp's q or k is each row of ours: intp [width], width = heads * head_dim.

    llama.cpp rotates neighbours, (2i, 2i + 1); Hugging Face rotates halves, (i, i + D/2). Its converter
    therefore moves row s * D/2 + i of every head to 2i + s; here is the way back.
    """
    return np.arange(width).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _tasks(file: GGUFFile, config: ModelConfig, leaf: Leaf, array: NDArray) -> Iterator[Task]:
    """Cuts one tensor into ranges of rows of about `TILE` to 1 M weights."""
    tensor = file.tensors[gguf_name(leaf.path)]
    raw = file.rows(tensor)
    if len(tensor.shape) == 1:
        if tensor.type.dtype is None:
            raise UnsupportedCheckpointError(f"{file.path}: {tensor.name!r} is a quantised vector ({tensor.type.name})")
        raw, array = raw.reshape(tensor.shape[0], -1), array[:, None]
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf.path[-2], 0)
    order = half_rotation_order(rotated, len(raw)) if rotated else None
    if leaf.spec.transposed:  # lanes = rows: as many as fill a tile with one block each
        step = max(64, TILE // tensor.type.block_size) if tensor.type.dtype is None else 512
    else:
        step = max(1, (1 << 20) // prod(tensor.shape[1:]))
    for start in range(0, len(raw), step):
        rows = slice(start, min(start + step, len(raw)))
        target = array[:, rows] if leaf.spec.transposed else array[rows]
        yield _task(file, tensor, raw, rows, order, target, leaf.spec.transposed)


def _task(
    file: GGUFFile,
    tensor: GGUFTensor,
    raw: NDArray[np.uint8],
    rows: slice,
    order: NDArray[np.intp] | None,
    target: NDArray,
    transposed: bool,
) -> Task:
    """Fills `target` with some rows of a tensor; with `order`, with the rows that belong there."""
    start, nbytes = rows.start * raw.shape[1], raw[rows].size

    def run() -> None:
        packed = raw[rows if order is None else order[rows]]
        if tensor.type.dtype is None:
            expand(packed, tensor.type, target, transpose=transposed)
        else:
            values = packed.view(tensor.type.dtype)
            copy_cast(values.T if transposed else values, target)
        file.release(tensor, start, nbytes)  # keeps the resident set near the size of the parameters

    return Task(tensor.name, nbytes, run)


def _scalar(file: GGUFFile, prefix: str, key: str, default: Any = None) -> Any:
    """metadata["prefix.key"], or `default`; lists are refused."""
    value = file.metadata.get(f"{prefix}.{key}", default)
    if isinstance(value, list | np.ndarray):
        raise UnsupportedCheckpointError(
            f"{file.path}: {prefix}.{key} is a list; models whose layers differ are not supported"
        )
    # A float32 in the file stands for a decimal: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(file: GGUFFile, get: Callable[..., Any], context: Any, head_dim: Any) -> dict[str, Any]:
    """The RoPE metadata in Hugging Face's spelling; `get` reads keys of the rope group."""
    rope: dict[str, Any] = {"rope_theta": get("freq_base", 10000.0)}
    rotated = get("dimension_count", head_dim)
    if _positive(rotated) and _positive(head_dim) and rotated != head_dim:
        raise UnsupportedCheckpointError(
            f"{file.path}: only {rotated} of {head_dim} dimensions of a head are rotated: not supported"
        )
    if _ROPE_DIVISORS in file.tensors:
        return rope | _frequency_divisors(file, rope["rope_theta"], context)
    kind = get("scaling.type", "linear" if get("scale_linear") else "none")
    factor = get("scaling.factor", get("scale_linear"))
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpointError(
            f"{file.path}: RoPE scaling {kind!r} is not supported; use none, linear or yarn"
        )
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": get("scaling.original_context_length"),
            "attention_factor": _yarn_attention(get("scaling.attn_factor"), factor),
            "beta_fast": get("scaling.yarn_beta_fast"),
            "beta_slow": get("scaling.yarn_beta_slow"),
        }
    return rope


def _yarn_attention(attn_factor: Any, factor: Any) -> float | None:
    """llama.cpp multiplies the derived attention factor by `attn_factor`; Hugging Face replaces it."""
    if attn_factor in (None, 1.0) or not isinstance(factor, float) or factor <= 1:
        return None
    return attn_factor * (0.1 * math.log(factor) + 1.0)


def _frequency_divisors(file: GGUFFile, theta: Any, context: Any) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF keeps as one divisor per frequency instead of the formula's parameters.

    All published Llama 3.x models differ in `factor` alone, which is the largest divisor. Should the other
    parameters not be the usual ones, longrope says the same with equal short and long factors.
    """
    tensor = file.tensors[_ROPE_DIVISORS]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UnsupportedCheckpointError(f"{file.path}: {_ROPE_DIVISORS} must be a float32 vector")
    divisors = file.rows(tensor).view(np.float32)[0].astype(np.float64)
    if not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise CorruptCheckpointError(f"{file.path}: {_ROPE_DIVISORS} holds numbers that are not positive")
    low, high, original, factor = 1.0, 4.0, 8192, float(divisors.max())
    if isinstance(theta, float) and theta > 0:
        turns = original / (2 * np.pi) * theta ** -(np.arange(len(divisors)) / len(divisors))
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
        if np.allclose(1 / divisors, blend + (1 - blend) / factor, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": context,
    }


def _end_tokens(file: GGUFFile) -> list[Any]:
    """End of sequence, and end of turn and of message where the file names them."""
    ends = [_scalar(file, "tokenizer.ggml", f"{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return [token for token in ends if token is not None]


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
