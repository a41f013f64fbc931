"""OLMo 2: norms behind attention and MLP instead of before them, and on the whole of q and k (arXiv 2501.00656)."""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import Angles, Attention, DecoderLayer, GatedMLP
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class Olmo2Attention(Attention):
    """q and k normed, all heads together."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q = nn.RMSNorm(self.config.norm_eps, self.dtype, name="q_norm")(self.projection("q_proj", heads)(x))
        k = nn.RMSNorm(self.config.norm_eps, self.dtype, name="k_norm")(self.projection("k_proj", kv_heads)(x))
        v = self.projection("v_proj", kv_heads)(x)
        return self.split(q, heads), self.split(k, kv_heads), self.split(v, kv_heads)


class Olmo2Layer(DecoderLayer):
    """Norms between each block and the residual stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = Olmo2Attention(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(x, angles, kv, layout)
        x = x + self.rms_norm("post_attention_layernorm")(attended)
        mlp = GatedMLP(self.config, self.dtype, name="mlp")
        return x + self.rms_norm("post_feedforward_layernorm")(mlp(x)), kv


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2."""

    layer_class = Olmo2Layer
