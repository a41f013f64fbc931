"""Layers that the model families share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.config import ModelConfig
from jpaged.models.layout import PagedLayout
from jpaged.models.rope import rotate
from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention, write_kv


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama (GLU variants, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config = self.config
        gate = nn.Dense(config.intermediate_size, config.mlp_bias, self.dtype, name="gate_proj")(x)
        up = nn.Dense(config.intermediate_size, config.mlp_bias, self.dtype, name="up_proj")(x)
        return nn.Dense(config.hidden_size, config.mlp_bias, self.dtype, name="down_proj")(nn.silu(gate) * up)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over a paged pool or over the batch itself."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], kv: jax.Array | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, E] without a pool, [T, E] with one. Returns (output like x, the layer's pool)."""
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def project(name: str, count: int) -> jax.Array:
            flat = nn.Dense(count * size, config.attention_bias, self.dtype, name=name)(x)
            return flat.reshape(*x.shape[:-1], count, size)

        q = rotate(project("q_proj", heads), *angles)  # [..., T, Hq, D]
        k = rotate(project("k_proj", kv_heads), *angles)  # [..., T, Hkv, D]
        v = project("v_proj", kv_heads)
        if kv is None or layout is None:
            out = self._dense(q, k, v)
        else:
            kv = write_kv(kv, k, v, layout.slots)
            out = self._paged(q, kv, layout)
        out = out.reshape(*x.shape[:-1], heads * size)
        return nn.Dense(config.hidden_size, config.attention_bias, self.dtype, name="o_proj")(out), kv

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _dense(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        window = self.config.sliding_window
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, scale=self._scale, is_causal=True, local_window_size=local)

    def _paged(self, q: jax.Array, kv: jax.Array, layout: PagedLayout) -> jax.Array:
        rows, tiles = layout.num_decodes, layout.num_tiles
        scale, window = self._scale, self.config.sliding_window
        lanes = []
        if rows:
            lanes.append(
                paged_decode_attention(
                    q[:rows], kv, layout.decode_tables, layout.decode_lengths, scale=scale, sliding_window=window
                )
            )
        if tiles:
            tiled = q[rows:].reshape(tiles, -1, *q.shape[1:])  # [P, C, Hq, D]
            out = paged_prefill_attention(
                tiled,
                kv,
                layout.prefill_tables,
                layout.prefill_starts,
                layout.prefill_lengths,
                scale=scale,
                sliding_window=window,
            )
            lanes.append(out.reshape(-1, *q.shape[1:]))
        return jnp.concatenate(lanes) if len(lanes) > 1 else lanes[0]
