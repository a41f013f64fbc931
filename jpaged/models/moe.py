"""Mixtures of experts (arXiv 2101.03961, 2401.04088): each token goes through a few of many MLPs.

A family's router says which experts work on a token and with what weight; `dispatch` sorts the tokens by expert, so
that only the chosen ones are computed, as a grouped matmul.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpaged.models.config import MoEConfig
from jpaged.models.dense import Dense
from jpaged.models.layers import ACTIVATIONS
from jpaged.models.sharding import TENSOR, split_width
from pallas_kernels.grouped_matmul import grouped_matmul

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
"""matmul([N, A], [X, A, B]) -> [N, B]: each row times the matrix of its expert."""


def dispatch(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, num_experts: int, run: Callable[..., jax.Array]
) -> jax.Array:
    """The weighted sum of what the chosen experts make of each token.

    Args:
      x: [T, E].
      chosen: int32 [T, K]: experts of each token.
      weights: float32 [T, K].
      num_experts: X.
      run: run(rows [T * K, E], matmul, experts int32 [T * K]) -> [T * K, E], all experts' work on rows that are sorted
        by expert; see `Matmul`.

    Returns: [T, E], x's dtype.
    """
    per_token = chosen.shape[-1]
    experts = chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=num_experts)
    rows = run(x[order // per_token], lambda rows, matrices: grouped_matmul(rows, matrices, sizes), experts[order])
    back = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)  # [T, K, E]
    return jnp.einsum("tk,tke->te", weights, back.astype(jnp.float32)).astype(x.dtype)


def softmax_top_k(logits: jax.Array, count: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """The best experts by softmax over all: logits [T, X] -> (chosen int32 [T, K], weights float32 [T, K])."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
    return chosen, weights / weights.sum(-1, keepdims=True) if normalise else weights


class GatedExperts(nn.Module):
    """Experts that are gated MLPs; one array [X, in, out] for each of their three matrices."""

    config: MoEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:  # [T, E] -> [T, E]
        config, x = self.config, x.astype(self.dtype)
        count, hidden, width = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
        init = nn.initializers.lecun_normal(batch_axis=0)
        gate = self.param("gate_proj", init, (count, hidden, width)).astype(self.dtype)
        up = self.param("up_proj", init, (count, hidden, width)).astype(self.dtype)
        down = self.param("down_proj", init, (count, width, hidden)).astype(self.dtype)

        def slices(x, chosen, weights, gate, up, down) -> jax.Array:
            def run(rows: jax.Array, matmul: Matmul, experts: jax.Array) -> jax.Array:
                return matmul(ACTIVATIONS[config.hidden_act](matmul(rows, gate)) * matmul(rows, up), down)

            return dispatch(x, chosen, weights, count, run)

        inward, outward = P(None, None, TENSOR), P(None, TENSOR)
        return split_width(slices, width, (P(), P(), P(), inward, inward, outward))(x, chosen, weights, gate, up, down)


class SparseMLP(nn.Module):
    """A softmax router and its experts, in place of an MLP: Mixtral's and Qwen 3's."""

    config: MoEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        logits = Dense(config.num_local_experts, use_bias=False, dtype=self.dtype, name="gate")(tokens)
        chosen, weights = softmax_top_k(logits, config.num_experts_per_tok, config.norm_topk_prob)
        return GatedExperts(config, self.dtype, name="experts")(tokens, chosen, weights).reshape(x.shape)
