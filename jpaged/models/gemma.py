"""Gemma 2 (arXiv 2408.00118) and Gemma 3, text (arXiv 2503.19786).

Norms stand before and behind attention and MLP, and scale by 1 + their parameter. Every other layer of Gemma 2, five of
six in Gemma 3, see a window only. Gemma 2 caps scores and logits; Gemma 3 norms q and k instead.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import Gemma2Config
from jpaged.models.layers import Angles, Attention, DecoderLayer, GatedMLP
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class GemmaRMSNorm(nn.Module):
    """RMSNorm whose scale is 1 + its parameter, all in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)


class Gemma2Attention(Attention):
    """Capped scores."""

    config: Gemma2Config

    @property
    def logit_soft_cap(self) -> float | None:
        return self.config.attn_logit_softcapping


class Gemma3Attention(Gemma2Attention):
    """q and k normed, head by head."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        q = GemmaRMSNorm(self.config.norm_eps, self.dtype, name="q_norm")(q)
        k = GemmaRMSNorm(self.config.norm_eps, self.dtype, name="k_norm")(k)
        return q, k, v


class Gemma2Layer(DecoderLayer):
    """Norms before and behind attention and MLP."""

    config: Gemma2Config

    attention_class: ClassVar[type[Gemma2Attention]] = Gemma2Attention

    def norm(self, name: str) -> nn.Module:
        return GemmaRMSNorm(self.config.norm_eps, self.dtype, name=name)

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = self.attention_class(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(self.norm("input_layernorm")(x), angles, kv, layout)
        x = x + self.norm("post_attention_layernorm")(attended)
        mlp = GatedMLP(self.config, self.dtype, name="mlp")
        return x + self.norm("post_feedforward_layernorm")(mlp(self.norm("pre_feedforward_layernorm")(x))), kv


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's, with norms on q and k."""

    attention_class = Gemma3Attention


class Gemma2ForCausalLM(CausalLM):
    """Gemma 2."""

    config: Gemma2Config
    layer_class = Gemma2Layer

    def make_norm(self) -> nn.Module:
        return GemmaRMSNorm(self.config.norm_eps, self.dtype)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return super().embed(tokens, positions) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        logits, cap = super().head(hidden), self.config.final_logit_softcapping
        return logits if cap is None else jnp.tanh(logits / cap) * cap


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3, text."""

    layer_class = Gemma3Layer
