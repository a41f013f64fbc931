"""GPT-OSS (arXiv 2508.10925): a learned sink in every softmax, clamped experts with biases, alternating windows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import GptOssConfig
from jpaged.models.dense import Dense
from jpaged.models.layers import Attention
from jpaged.models.llama import LlamaLayer
from jpaged.models.moe import Matmul, dispatch, softmax_top_k
from jpaged.models.sharding import TENSOR, once, split_width


class GptOssAttention(Attention):
    """A sink in every head."""

    def sinks(self) -> jax.Array:
        return self.param("sinks", nn.initializers.zeros, (self.config.num_attention_heads,))


class GptOssExperts(nn.Module):
    """(up + 1) * gate * sigmoid(alpha * gate), clamped; gate and up alternate in one matrix."""

    config: GptOssConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:  # [T, E] -> [T, E]
        config = self.config
        count, hidden, width = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
        init, zeros = nn.initializers.lecun_normal(batch_axis=0), nn.initializers.zeros
        inward = self.param("gate_up_proj", init, (count, hidden, 2 * width)).astype(self.dtype)
        inward_bias = self.param("gate_up_proj_bias", zeros, (count, 2 * width)).astype(self.dtype)
        outward = self.param("down_proj", init, (count, width, hidden)).astype(self.dtype)
        outward_bias = self.param("down_proj_bias", zeros, (count, hidden)).astype(self.dtype)

        def slices(x, chosen, weights, inward, inward_bias, outward, outward_bias) -> jax.Array:
            def run(rows: jax.Array, matmul: Matmul, experts: jax.Array) -> jax.Array:
                both = matmul(rows, inward) + inward_bias[experts]
                gate = jnp.minimum(both[..., 0::2], config.swiglu_limit)
                up = jnp.clip(both[..., 1::2], -config.swiglu_limit, config.swiglu_limit)
                gated = (up + 1) * gate * nn.sigmoid(config.swiglu_alpha * gate)
                return matmul(gated, outward) + once(outward_bias)[experts]

            return dispatch(x.astype(self.dtype), chosen, weights, count, run)

        specs = (P(), P(), P(), P(None, None, TENSOR), P(None, TENSOR), P(None, TENSOR), P())
        arrays = (inward, inward_bias, outward, outward_bias)
        return split_width(slices, width, specs)(x, chosen, weights, *arrays)


class GptOssMLP(nn.Module):
    """A softmax over the chosen experts, and the experts."""

    config: GptOssConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        logits = Dense(config.num_local_experts, dtype=self.dtype, name="router")(tokens)
        # A softmax over the chosen alone is one over all, normalised.
        chosen, weights = softmax_top_k(logits, config.num_experts_per_tok, normalise=True)
        return GptOssExperts(config, self.dtype, name="experts")(tokens, chosen, weights).reshape(x.shape)


class GptOssLayer(LlamaLayer):
    """Llama's, of these two."""

    attention_class = GptOssAttention
    mlp_class = GptOssMLP


class GptOssForCausalLM(CausalLM):
    """GPT-OSS."""

    layer_class = GptOssLayer
