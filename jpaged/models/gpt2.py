"""GPT-2: learned positions, LayerNorm, q, k, v in one projection."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import MLP, Angles, Attention, DecoderLayer
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class GPT2Attention(Attention):
    """One projection to q, k and v, in this order."""

    output_name = "c_proj"

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = self.config.num_attention_heads
        q, k, v = jnp.split(self.split(self.projection("c_attn", 3 * heads)(x), 3 * heads), 3, axis=-2)
        return q, k, v


class GPT2Layer(DecoderLayer):
    """LayerNorm before attention and before the MLP."""

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = GPT2Attention(self.config, self.dtype, self.layer, name="attn")
        attended, kv = attention(self.layer_norm("ln_1")(x), angles, kv, layout)
        x = x + attended
        return x + MLP(self.config, self.dtype, ("c_fc", "c_proj"), name="mlp")(self.layer_norm("ln_2")(x)), kv


class GPT2LMHeadModel(CausalLM):
    """GPT-2."""

    layer_class = GPT2Layer

    def setup(self) -> None:
        super().setup()
        self.embed_positions = nn.Embed(self.config.max_position_embeddings, self.config.hidden_size, self.dtype)

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.norm_eps, self.dtype, use_fast_variance=False)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().embed(tokens, positions) + self.embed_positions(positions)
