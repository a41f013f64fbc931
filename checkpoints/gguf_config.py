"""A GGUF file's metadata -> `ModelConfig`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from checkpoints.errors import CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile
from checkpoints.gguf_architectures import ARCHITECTURES, Architecture
from jpaged.models.config import ModelConfig, config_from_hf

ROPE_DIVISORS = "rope_freqs.weight"
"""The one tensor that belongs to the configuration."""


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads the model's configuration from a GGUF file's metadata.

    Raises:
        UnsupportedCheckpointError: another architecture, or a feature of it that jpaged does not implement.
        ModelConfigError: metadata that is missing or out of range.
    """
    architecture, arch = architecture_of(file), file.metadata["general.architecture"]
    get = partial(_scalar, file, arch)
    if get("expert_count"):
        raise UnsupportedCheckpointError(f"{file.path}: mixture-of-experts models are not supported; use a dense one")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    derived = hidden // heads if _positive(heads) and _positive(hidden) else None
    head_dim = get("attention.key_length", derived)
    if get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedCheckpointError(f"{file.path}: keys and values of different widths are not supported")
    embedding = file.tensors.get("token_embd.weight")
    values = {
        "model_type": architecture.model_type,
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
        **architecture.more(get),
    }
    return config_from_hf({key: value for key, value in values.items() if value is not None})


def architecture_of(file: GGUFFile) -> Architecture:
    """What kind of model a file holds.

    Raises:
        UnsupportedCheckpointError: none that jpaged reads.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


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
    if ROPE_DIVISORS in file.tensors:
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
    tensor = file.tensors[ROPE_DIVISORS]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UnsupportedCheckpointError(f"{file.path}: {ROPE_DIVISORS} must be a float32 vector")
    divisors = file.rows(tensor).view(np.float32)[0].astype(np.float64)
    if not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise CorruptCheckpointError(f"{file.path}: {ROPE_DIVISORS} holds numbers that are not positive")
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
