"""DeepSeek-V3 and R1 (arXiv 2412.19437): multi-head latent attention, shared and routed experts.

Keys and values of all heads are made from one narrow latent per token. The pool holds the latent and the one rotated
key that all heads share; the matrices that would expand them are applied to queries and outputs instead (arXiv
2405.04434, section 2.1.2), so that attention is multi-query attention over latents, in training as in serving.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import DeepseekV3Config, LayerConfig
from jpaged.models.dense import Dense, kernel
from jpaged.models.layers import Angles, DecoderLayer, GatedMLP, attend
from jpaged.models.layout import PagedLayout
from jpaged.models.llama import LlamaLayer
from jpaged.models.moe import GatedExperts
from jpaged.models.rope import rotate
from pallas_kernels.paged_attention import KV

_LATENT_EPS = 1e-6  # whatever the configuration says of the other norms


class LatentAttention(nn.Module):
    """MLA, in the form that never expands keys and values."""

    config: DeepseekV3Config
    dtype: jnp.dtype
    layer: LayerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        """As `jpaged.models.layers.Attention`."""
        config, rank, nope = self.config, self.config.kv_lora_rank, self.config.qk_nope_head_dim
        heads, lead = config.num_attention_heads, x.shape[:-1]
        q = self.queries(x).reshape(*lead, heads, config.head_dim)
        latent = self.dense("kv_a_proj_with_mqa", rank + config.qk_rope_head_dim, config.attention_bias)(x)
        latent, key = latent[..., :rank], latent[..., None, rank:]
        latent = nn.RMSNorm(_LATENT_EPS, self.dtype, name="kv_a_layernorm")(latent)[..., None, :]  # [..., 1, R]
        expand = self.expansion()
        q_latent = jnp.einsum("...hd,rhd->...hr", q[..., :nope], expand[..., :nope])
        out, kv = attend(
            jnp.concatenate([q_latent, self.rotated(q[..., nope:], angles)], axis=-1),
            jnp.concatenate([latent, self.rotated(key, angles)], axis=-1),
            latent,
            kv,
            layout,
            scale=config.attention_scale,
        )
        out = jnp.einsum("...hr,rhd->...hd", out, expand[..., nope:]).reshape(*lead, -1)
        return self.dense("o_proj", config.hidden_size, config.attention_bias)(out), kv

    def queries(self, x: jax.Array) -> jax.Array:
        config, width = self.config, self.config.num_attention_heads * self.config.head_dim
        if config.q_lora_rank is None:
            return self.dense("q_proj", width)(x)
        x = self.dense("q_a_proj", config.q_lora_rank, config.attention_bias)(x)
        return self.dense("q_b_proj", width)(nn.RMSNorm(_LATENT_EPS, self.dtype, name="q_a_layernorm")(x))

    def expansion(self) -> jax.Array:
        """What makes each head's key and value from the latent: [R, Hq, unrotated key + value]."""
        config = self.config
        width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        matrix = Kernel((config.kv_lora_rank, width), self.dtype, name="kv_b_proj")()
        return matrix.reshape(config.kv_lora_rank, config.num_attention_heads, -1)

    def rotated(self, x: jax.Array, angles: Angles) -> jax.Array:
        if angles is None:
            return x
        if self.config.rope_interleave:
            x = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return rotate(x, *angles)

    def dense(self, name: str, width: int, bias: bool = False) -> nn.Module:
        return Dense(width, bias, self.dtype, name=name)


class Kernel(nn.Module):
    """A bare `kernel` [in, out], where a `Dense` would have one."""

    shape: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return kernel(self, self.shape).astype(self.dtype)


class Router(nn.Module):
    """Sigmoid scores; the best experts of the best groups, chosen with a bias that does not weigh (section 2.1.2)."""

    config: DeepseekV3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:  # [T, E] -> int32 [T, K], float32 [T, K]
        config = self.config
        experts, groups = config.num_local_experts, config.n_group
        matrix = kernel(self, (config.hidden_size, experts))
        bias = self.param("e_score_correction_bias", nn.initializers.zeros, (experts,))
        scores = jax.nn.sigmoid(x.astype(jnp.float32) @ matrix.astype(jnp.float32))  # [T, X]
        choice = (scores + bias.astype(jnp.float32)).reshape(-1, groups, experts // groups)
        best = jax.lax.top_k(jax.lax.top_k(choice, 2)[0].sum(-1), config.topk_group)[1]  # [T, groups that may work]
        allowed = jax.nn.one_hot(best, groups, dtype=bool).any(axis=1)  # [T, G]
        choice = jnp.where(allowed[..., None], choice, -jnp.inf).reshape(-1, experts)
        chosen = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.norm_topk_prob:
            weights /= weights.sum(-1, keepdims=True) + 1e-20
        return chosen, weights * config.routed_scaling_factor


class DeepseekV3MoE(nn.Module):
    """Routed experts, and shared ones that see every token."""

    config: DeepseekV3Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., E] -> [..., E]
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        routed = GatedExperts(config, self.dtype, name="experts")(tokens, *Router(config, name="gate")(tokens))
        width = config.n_shared_experts * config.moe_intermediate_size
        return GatedMLP(config, self.dtype, width, name="shared_experts")(x) + routed.reshape(x.shape)


class DeepseekV3Layer(LlamaLayer):
    """Llama's, with latent attention."""

    attention_class = LatentAttention


class DeepseekV3SparseLayer(DeepseekV3Layer):
    """With experts, too."""

    mlp_class = DeepseekV3MoE


class DeepseekV3ForCausalLM(CausalLM):
    """DeepSeek-V3 and R1."""

    config: DeepseekV3Config

    def make_layer(self, index: int) -> DecoderLayer:
        layer_class = DeepseekV3SparseLayer if self.config.is_sparse(index) else DeepseekV3Layer
        return layer_class(self.config, self.dtype, self.config.layer(index))
