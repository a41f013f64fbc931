"""Scores on their way to exponentials of base 2, which is what GPUs have an instruction for."""

import math

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)


def soft_capped(scores: jax.Array, scale: float, cap: float | None) -> tuple[jax.Array, float]:
    """(scores, factor): exp2(scores * factor) is the exponential of the scaled and, with a cap, soft-capped scores."""
    factor = scale * LOG2_E
    if cap is None:
        return scores, factor
    # tanh(x) = 1 - 2 / (1 + exp(2x)): two fast instructions, and exact to 1e-7
    return 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2.0 * factor / cap))), cap * LOG2_E
