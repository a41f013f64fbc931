"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions.

The half-rotation convention of Hugging Face: dimension i pairs with i + d/2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig, RopeConfig, UnsupportedModelError


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """The angle a position adds in each pair of dimensions, and the factor on cos and sin.

    Returns: (float32 [rotary_dim / 2], attention factor).

    Raises:
      UnsupportedModelError: a variant that has no formula here.
    """
    dim = rope.rotary_dim(head_dim)
    base = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    match rope.rope_type:
        case "default" | "dynamic":  # dynamic NTK changes nothing up to the trained length, our limit
            frequencies, attention = base, 1.0
        case "linear":
            frequencies, attention = base / _given(rope.factor), 1.0
        case "llama3":
            frequencies, attention = _llama3(rope, base), 1.0
        case "yarn":
            frequencies, attention = _yarn(rope, base, dim)
        case "longrope":
            frequencies, attention = _longrope(rope, base)
        case other:
            raise UnsupportedModelError(f"rope_type {other!r} is not supported by this model.")
    return frequencies.astype(np.float32), attention


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between are blended."""
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    turns = _given(rope.original_max_position_embeddings) * base / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (blend + (1 - blend) / _given(rope.factor))


def _given(value: float | None) -> float:
    """A field that this rope_type always has: `ModelConfig` checked it."""
    if value is None:
        raise UnsupportedModelError("a RopeConfig lacks a field that its rope_type needs.")
    return value


def _yarn(rope: RopeConfig, base: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): section 3.2 for the ramp, 3.4 for the attention factor."""

    def dimension_of(rotations: float) -> float:
        period = _given(rope.original_max_position_embeddings) / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(rope.theta))

    factor = _given(rope.factor)
    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequencies = base / factor * ramp + base * (1 - ramp)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        attention = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        attention = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    else:
        attention = mscale(1.0)
    return frequencies, attention


def _longrope(rope: RopeConfig, base: np.ndarray) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753), with the factors for long texts; see `ModelConfig.for_length` for short ones."""
    factor, original = _given(rope.factor), _given(rope.original_max_position_embeddings)
    divisors = np.array(rope.long_factor if factor > 1 else rope.short_factor)
    if rope.attention_factor is not None:
        return base / divisors, rope.attention_factor
    return base / divisors, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def max_trained_length(config: ModelConfig) -> int:
    """Longest sequence that the frequencies are right for."""
    if config.rope is not None and config.rope.rope_type == "dynamic":
        return min(config.max_position_embeddings, int(_given(config.rope.original_max_position_embeddings)))
    return config.max_position_embeddings


def cos_sin(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, float32 [*positions.shape, rotary_dim / 2]."""
    frequencies, attention = inverse_frequencies(rope, head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention, jnp.sin(angles) * attention


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first 2 * cos.shape[-1] dimensions of heads x [..., H, D]; cos, sin [..., d / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([r.astype(x.dtype) for r in rotated] + [x[..., 2 * half :]], axis=-1)
