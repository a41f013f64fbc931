"""Qwen 3: Llama with RMSNorm on each head of q and k (arXiv 2505.09388)."""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import Attention
from jpaged.models.llama import LlamaLayer


class Qwen3Attention(Attention):
    """q and k normed, head by head."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        q = nn.RMSNorm(self.config.norm_eps, self.dtype, name="q_norm")(q)
        k = nn.RMSNorm(self.config.norm_eps, self.dtype, name="k_norm")(k)
        return q, k, v


class Qwen3Layer(LlamaLayer):
    """Llama's, with these norms."""

    attention_class = Qwen3Attention


class Qwen3ForCausalLM(CausalLM):
    """Qwen 3."""

    layer_class = Qwen3Layer
