"""The Llama family: Llama 1 to 3, Mistral, SmolLM2. One module trains and serves.

hidden, _ = model.apply({"params": params}, tokens)                                  # [B, T] training
hidden, pool = model.apply({"params": params}, tokens, positions, pool, layout)      # [T]    a paged step
logits = model.apply({"params": params}, hidden, method=model.logits)
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.config import ModelConfig
from jpaged.models.layers import Attention, GatedMLP
from jpaged.models.layout import PagedLayout
from jpaged.models.rope import cos_sin

Pool = tuple[jax.Array, ...]
"""One array of blocks per layer; see `pallas_kernels.paged_attention` for the layout."""


class DecoderLayer(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], kv: jax.Array | None, layout: PagedLayout | None
    ) -> tuple[jax.Array, jax.Array | None]:
        eps = self.config.rms_norm_eps
        normed = nn.RMSNorm(eps, self.dtype, name="input_layernorm")(x)
        attended, kv = Attention(self.config, self.dtype, name="self_attn")(normed, angles, kv, layout)
        x = x + attended
        normed = nn.RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x)
        return x + GatedMLP(self.config, self.dtype, name="mlp")(normed), kv


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(layer: DecoderLayer, variables, *arguments):
    return layer.apply(variables, *arguments)


class LlamaForCausalLM(nn.Module):
    """A decoder-only transformer: RMSNorm, rotary grouped-query attention, gated MLP.

    Attributes:
      config: sizes and constants.
      dtype: of activations and of K and V; sums and logits are float32.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, self.dtype)
        self.layers = [DecoderLayer(config, self.dtype) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.rms_norm_eps, self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=_float32_result)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        pool: Pool | None = None,
        layout: PagedLayout | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """The final hidden states, normed.

        Args:
          tokens: int32 [B, T] without a pool, [T] with one.
          positions: int32, like tokens; None: 0, 1, 2, ... along the last axis.
          pool: the paged KV cache, one array a layer. None: the tokens attend to each other, causally.
          layout: where the tokens' K and V go, and what they attend to. Needed with a pool.

        Returns: (hidden [*tokens.shape, E], pool with the tokens' K and V written, or None).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = self.embed_tokens(tokens)
        angles = cos_sin(self.config.rope, self.config.head_dim, positions)
        layers: list[jax.Array | None] = []
        for i, layer in enumerate(self.layers):
            x, kv = self._run(layer, x, angles, None if pool is None else pool[i], layout)
            layers.append(kv)
        return self.norm(x), None if pool is None else tuple(kv for kv in layers if kv is not None)

    def _run(self, layer: DecoderLayer, *arguments):
        if self.is_initializing():
            return layer(*arguments)
        # As a jitted function of its parameters, one layer is traced for all: 30 of them take seconds otherwise.
        return _apply_layer(layer.clone(name=None, parent=None), layer.variables, *arguments)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., E]."""
        if self.config.tie_word_embeddings:
            embedding = self.embed_tokens.embedding.astype(self.dtype)
            return _float32_result(hidden, embedding, (((hidden.ndim - 1,), (1,)), ((), ())))
        return self.lm_head(hidden)

    def forward_logits(self, tokens: jax.Array) -> jax.Array:
        """The training forward pass: int32 [B, T] -> float32 logits [B, T, V]. Also what `init` is called with."""
        return self.logits(self(tokens)[0])


def _float32_result(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
    """dot_general that accumulates and returns float32 whatever its inputs are."""
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, jnp.float32)
