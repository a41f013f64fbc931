"""StarCoder 2: LayerNorm, biases and a plain MLP, with RoPE and grouped-query attention (arXiv 2402.19173)."""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import MLP, Angles, Attention, DecoderLayer
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class Starcoder2Layer(DecoderLayer):
    """LayerNorm before attention and before the MLP."""

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = Attention(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(self.layer_norm("input_layernorm")(x), angles, kv, layout)
        x = x + attended
        mlp = MLP(self.config, self.dtype, ("c_fc", "c_proj"), name="mlp")
        return x + mlp(self.layer_norm("post_attention_layernorm")(x)), kv


class Starcoder2ForCausalLM(CausalLM):
    """StarCoder 2."""

    layer_class = Starcoder2Layer

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.norm_eps, self.dtype, use_fast_variance=False)
