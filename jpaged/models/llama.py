"""The Llama family: Llama 1 to 3, Mistral, SmolLM2."""

from typing import ClassVar

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import Angles, Attention, DecoderLayer, GatedMLP
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class LlamaLayer(DecoderLayer):
    """RMSNorm before attention and before the MLP. Families with another attention or MLP name theirs."""

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module]] = GatedMLP

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = self.attention_class(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(self.rms_norm("input_layernorm")(x), angles, kv, layout)
        x = x + attended
        mlp = self.mlp_class(self.config, self.dtype, name="mlp")
        return x + mlp(self.rms_norm("post_attention_layernorm")(x)), kv


class LlamaForCausalLM(CausalLM):
    """A decoder-only transformer: RMSNorm, rotary grouped-query attention, gated MLP."""

    layer_class = LlamaLayer
