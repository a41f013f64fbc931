"""GPT-NeoX and Pythia (arXiv 2204.06745): partial RoPE; attention and MLP side by side on the residual stream."""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import GPTNeoXConfig
from jpaged.models.layers import MLP, Angles, Attention, DecoderLayer
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV


class GPTNeoXAttention(Attention):
    """One projection to q, k and v."""

    output_name = "dense"

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = self.config.num_attention_heads
        # Head by head: q, k and v of the first, then of the second, ...
        qkv = self.projection("query_key_value", 3 * heads)(x).reshape(*x.shape[:-1], heads, 3, -1)
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


class GPTNeoXLayer(DecoderLayer):
    """Attention and MLP side by side, or one after the other."""

    config: GPTNeoXConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        attention = GPTNeoXAttention(self.config, self.dtype, self.layer, name="attention")
        mlp = MLP(self.config, self.dtype, ("dense_h_to_4h", "dense_4h_to_h"), name="mlp")
        attended, kv = attention(self.layer_norm("input_layernorm")(x), angles, kv, layout)
        seen = x if self.config.use_parallel_residual else x + attended
        return x + attended + mlp(self.layer_norm("post_attention_layernorm")(seen)), kv


class GPTNeoXForCausalLM(CausalLM):
    """GPT-NeoX and Pythia."""

    layer_class = GPTNeoXLayer

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.norm_eps, self.dtype, use_fast_variance=False)
