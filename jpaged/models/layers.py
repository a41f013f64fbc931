"""Layers that the model families share, and the one place where they all meet attention."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpaged.models.config import LayerConfig, ModelConfig
from jpaged.models.dense import Dense, feed_forward
from jpaged.models.layout import PagedLayout, Tap
from jpaged.models.rope import rotate
from jpaged.models.sharding import HEADS, POOL, TENSOR, split
from pallas_kernels.paged_attention import KV, paged_decode_attention, paged_prefill_attention, pool_values, write_kv

Angles = tuple[jax.Array, jax.Array] | None
"""cos and sin of a layer's positions, float32 [*positions.shape, rotary dim / 2]; None: nothing is rotated."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}
"""By `ModelConfig.hidden_act`."""


class DecoderLayer(nn.Module):
    """What a family's layer is: a module with these fields and this call. Equal ones are traced once for all layers."""

    config: ModelConfig
    dtype: jnp.dtype
    layer: LayerConfig

    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        """x [B, T, E] without a pool, [T, E] with one. Returns (x, the layer's pool)."""
        raise NotImplementedError

    def rms_norm(self, name: str) -> nn.Module:
        return nn.RMSNorm(self.config.norm_eps, self.dtype, name=name)

    def layer_norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(self.config.norm_eps, self.dtype, use_fast_variance=False, name=name)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), as in Llama (GLU variants, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: jnp.dtype
    width: int | None = None
    """None: `config.intermediate_size`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config, width = self.config, self.width or self.config.intermediate_size
        gate = Dense(width, config.mlp_bias, self.dtype, name="gate_proj")
        up = Dense(width, config.mlp_bias, self.dtype, name="up_proj")
        down = Dense(config.hidden_size, config.mlp_bias, self.dtype, name="down_proj")
        return feed_forward(x, [gate, up], lambda gate, up: ACTIVATIONS[config.hidden_act](gate) * up, down)


class MLP(nn.Module):
    """out(act(in(x))), under the names that a family gives its two projections."""

    config: ModelConfig
    dtype: jnp.dtype
    names: tuple[str, str]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config, (first, second) = self.config, self.names
        inner = Dense(config.intermediate_size, config.mlp_bias, self.dtype, name=first)
        outer = Dense(config.hidden_size, config.mlp_bias, self.dtype, name=second)
        return feed_forward(x, [inner], ACTIVATIONS[config.hidden_act], outer)


class Attention(nn.Module):
    """Grouped-query attention, over a paged pool or over the batch itself.

    A family overrides how q, k and v are made (`project`), and the constants below.
    """

    config: ModelConfig
    dtype: jnp.dtype
    layer: LayerConfig

    output_name: ClassVar[str] = "o_proj"
    """Name of the output projection."""

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        """x [B, T, E] without a pool, [T, E] with one. Returns (output like x, the layer's pool)."""
        q, k, v = self.project(x)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        out, kv = attend(
            q,
            k,
            v,
            kv,
            layout,
            scale=self.config.attention_scale,
            sliding_window=self.layer.sliding_window,
            logit_soft_cap=self.logit_soft_cap,
            sinks=self.sinks(),
        )
        out = out.reshape(*x.shape[:-1], -1)
        return Dense(self.config.hidden_size, self.output_bias, self.dtype, name=self.output_name)(out), kv

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., E] -> q [..., Hq, D], k [..., Hkv, D], v [..., Hkv, D]."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return (
            self.split(self.projection("q_proj", heads)(x), heads),
            self.split(self.projection("k_proj", kv_heads)(x), kv_heads),
            self.split(self.projection("v_proj", kv_heads)(x), kv_heads),
        )

    def projection(self, name: str, heads: int) -> nn.Module:
        """A projection to so many heads."""
        return Dense(heads * self.config.head_dim, self.input_bias, self.dtype, name=name)

    def split(self, x: jax.Array, heads: int) -> jax.Array:
        """[..., heads * D] -> [..., heads, D]."""
        return x.reshape(*x.shape[:-1], heads, self.config.head_dim)

    @property
    def input_bias(self) -> bool:
        return self.config.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.config.attention_bias

    @property
    def logit_soft_cap(self) -> float | None:
        return None

    def sinks(self) -> jax.Array | None:
        """[Hq]: a score for each head that takes its share of the softmax and has no value."""
        return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: KV | None,
    layout: PagedLayout | Tap | None,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, KV | None]:
    """Causal attention of new tokens to themselves and to what the pool holds.

    Args:
      q, k, v: [B, T, heads, D] without a pool, [T, heads, D] with one, of R + P * C tokens as `PagedLayout` says.
        A v that is narrower than k is k's first columns: the pool then holds k alone.
      kv: the layer's pool. None: the tokens attend to each other. It may hold each KV head several times, side by
        side, so that a mesh in scope divides them.
      layout: where their K and V go, and what they attend to. Needed with a pool.
      scale, sliding_window, logit_soft_cap, sinks: see `pallas_kernels.paged_attention`.

    Returns: (like q, of v's width; the pool with k and v written).
    """
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "logit_soft_cap": logit_soft_cap}
    if isinstance(layout, Tap):
        return layout.attention(q, k, v, sinks, **options), kv
    if kv is None or layout is None:
        return _dense(q, k, v, sinks=sinks, **options), kv
    repeats = pool_values(kv).shape[2] // k.shape[1]
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
    paged = functools.partial(_paged, **options)
    return split(paged, (HEADS, HEADS, HEADS, POOL, P(), P(TENSOR)), (HEADS, POOL))(q, k, v, kv, layout, sinks)


def _paged(q, k, v, kv, layout: PagedLayout, sinks, **options: Any) -> tuple[jax.Array, KV]:
    """Attention over the pool; on a mesh, of one device's heads."""
    options["sinks"] = sinks
    narrower = v.shape[-1] < k.shape[-1]
    kv = write_kv(kv, k, None if narrower else v, layout.slots)
    rows, tiles = layout.num_decodes, layout.num_tiles
    lanes = []
    if rows:
        lengths, shared = layout.decode_lengths, layout.decode_shared
        lanes.append(paged_decode_attention(q[:rows], kv, layout.decode_tables, lengths, shared=shared, **options))
    if tiles:
        out = paged_prefill_attention(
            q[rows:].reshape(tiles, -1, *q.shape[1:]),  # [P, C, Hq, D]
            kv,
            layout.prefill_tables,
            layout.prefill_starts,
            layout.prefill_lengths,
            **options,
        )
        lanes.append(out.reshape(-1, *q.shape[1:]))
    out = jnp.concatenate(lanes) if len(lanes) > 1 else lanes[0]
    return out[..., : v.shape[-1]] if narrower else out, kv


def _dense(q, k, v, *, scale, sliding_window, logit_soft_cap, sinks) -> jax.Array:
    """Attention inside a batch: q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv] -> [B, T, Hq, Dv]."""
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if logit_soft_cap is not None:
        scores = jnp.tanh(scores / logit_soft_cap) * logit_soft_cap
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    seen = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:  # one more column, whose weight goes nowhere
        column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length].astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, v.shape[-1])
