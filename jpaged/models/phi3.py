"""Phi 3 and 4: Llama with q, k, v in one projection and gate, up in another (arXiv 2404.14219)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import ModelConfig
from jpaged.models.dense import Dense
from jpaged.models.layers import ACTIVATIONS, Attention
from jpaged.models.llama import LlamaLayer


class Phi3Attention(Attention):
    """One projection to q, k and v, in this order."""

    input_bias = False
    output_bias = False

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.split(self.projection("qkv_proj", heads + 2 * kv_heads)(x), heads + 2 * kv_heads)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=-2)
        return q, k, v


class Phi3MLP(nn.Module):
    """A gated MLP whose gate and up are one projection, in this order."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        both = Dense(2 * config.intermediate_size, use_bias=False, dtype=self.dtype, name="gate_up_proj")(x)
        gate, up = jnp.split(both, 2, axis=-1)
        hidden = ACTIVATIONS[config.hidden_act](gate) * up
        return Dense(config.hidden_size, use_bias=False, dtype=self.dtype, name="down_proj")(hidden)


class Phi3Layer(LlamaLayer):
    """Llama's, of these two."""

    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3ForCausalLM(CausalLM):
    """Phi 3 and 4."""

    layer_class = Phi3Layer
