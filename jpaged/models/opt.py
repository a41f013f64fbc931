"""OPT (arXiv 2205.01068): learned positions from 2 on, ReLU.

The 350M model has its norms behind the residual additions, and narrow embeddings that are projected.
"""

import flax.linen as nn
import jax

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import OPTConfig
from jpaged.models.dense import Dense, feed_forward
from jpaged.models.layers import ACTIVATIONS, Angles, Attention, DecoderLayer
from jpaged.models.layout import PagedLayout
from pallas_kernels.paged_attention import KV

_FIRST_POSITION = 2


class OPTAttention(Attention):
    """Llama's, under OPT's name of the output projection."""

    output_name = "out_proj"


class OPTLayer(DecoderLayer):
    """LayerNorm before attention and MLP, or behind the residual additions."""

    config: OPTConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, kv: KV | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, KV | None]:
        before = self.config.do_layer_norm_before
        norm = self.layer_norm("self_attn_layer_norm")
        attention = OPTAttention(self.config, self.dtype, self.layer, name="self_attn")
        attended, kv = attention(norm(x) if before else x, angles, kv, layout)
        x = x + attended if before else norm(x + attended)
        norm = self.layer_norm("final_layer_norm")
        added = self.mlp(norm(x) if before else x)
        return x + added if before else norm(x + added), kv

    def mlp(self, x: jax.Array) -> jax.Array:
        config = self.config
        inner = Dense(config.intermediate_size, config.mlp_bias, self.dtype, name="fc1")
        outer = Dense(config.hidden_size, config.mlp_bias, self.dtype, name="fc2")
        return feed_forward(x, [inner], ACTIVATIONS[config.hidden_act], outer)


class OPTForCausalLM(CausalLM):
    """OPT."""

    config: OPTConfig
    layer_class = OPTLayer

    def setup(self) -> None:
        super().setup()
        config = self.config
        positions = config.max_position_embeddings + _FIRST_POSITION
        self.embed_positions = nn.Embed(positions, config.hidden_size, self.dtype)
        if config.projects_embeddings:
            self.project_in = Dense(config.hidden_size, use_bias=False, dtype=self.dtype)
            self.project_out = Dense(config.word_embed_proj_dim, use_bias=False, dtype=self.dtype)

    @property
    def embedding_size(self) -> int:
        return self.config.word_embed_proj_dim

    def make_norm(self) -> nn.Module | None:
        if not self.config.final_norm:
            return None
        return nn.LayerNorm(self.config.norm_eps, self.dtype, use_fast_variance=False)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = super().embed(tokens, positions)
        x = self.project_in(x) if self.config.projects_embeddings else x
        return x + self.embed_positions(positions + _FIRST_POSITION)

    def head(self, hidden: jax.Array) -> jax.Array:
        return super().head(self.project_out(hidden) if self.config.projects_embeddings else hidden)
