"""Granite: Llama with constant factors on embeddings, scores, residual branches and logits (muP, arXiv 2408.13359)."""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import GraniteConfig
from jpaged.models.layers import Angles, Attention, DecoderLayer, GatedMLP
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class GraniteLayer(DecoderLayer):
    """Llama's, with a factor on what it adds to the residual stream."""

    config: GraniteConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        factor = self.config.residual_multiplier
        attention = Attention(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(self.rms_norm("input_layernorm")(x), angles, kv, layout)
        x = x + attended * factor
        mlp = GatedMLP(self.config, self.dtype, name="mlp")
        return x + mlp(self.rms_norm("post_attention_layernorm")(x)) * factor, kv


class GraniteForCausalLM(CausalLM):
    """Granite."""

    config: GraniteConfig
    layer_class = GraniteLayer

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().embed(tokens, positions) * self.config.embedding_multiplier

    def head(self, hidden: jax.Array) -> jax.Array:
        return super().head(hidden) / self.config.logits_scaling
