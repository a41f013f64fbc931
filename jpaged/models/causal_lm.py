"""The frame of every family: embeddings, layers, a final norm, logits. One module trains and serves.

hidden, _ = model.apply({"params": params}, tokens)                                  # [B, T] training
hidden, pool = model.apply({"params": params}, tokens, positions, pool, layout)      # [T]    a paged step
logits = model.apply({"params": params}, hidden, method=model.logits)

With mutable=["intermediates"], `apply` also returns each layer's activations at `SITES`, as Flax's `sow` does:
{"intermediates": {"residual": (one array a layer), "attention": ..., "mlp": ...}}.
"""

import functools
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models import batch_invariant
from jpaged.models.batch_invariant import in_tiles
from jpaged.models.config import ModelConfig, RopeConfig
from jpaged.models.dense import Dense, float32_result, unembed
from jpaged.models.layers import Angles, DecoderLayer
from jpaged.models.layout import GroupedLayout, PagedLayout
from jpaged.models.rope import cos_sin
from pallas_kernels.paged_attention import KV

Pool = tuple[KV, ...]
"""One array of blocks per layer, or for one layer of each group (`GroupedLayout`). `pallas_kernels.paged_attention` has
their layout."""


SITES = {"residual": (), "attention": ("self_attn", "attn", "attention"), "mlp": ("mlp", "fc2")}
"""Where activations can be captured: what the layer returns, or what its module of one of these names returns."""


class Capture(NamedTuple):
    """A choice of activations."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]

    def of(self, intermediates) -> jax.Array:
        """float32 [T, sites, layers, E] of what a paged step's `apply` returns under "intermediates"."""
        chosen = [jnp.stack([intermediates[site][layer] for layer in self.layers], axis=1) for site in self.sites]
        return jnp.stack(chosen, axis=1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _watch_layer(layer: DecoderLayer, variables, *arguments):
    """As `_apply_layer`, and the activations by site."""
    names = {name: site for site, modules in SITES.items() for name in modules}
    (x, kv), state = layer.apply(
        {"params": variables["params"]},
        *arguments,
        capture_intermediates=lambda module, method: method == "__call__" and module.name in names,
        mutable=["intermediates"],
    )
    seen = {"residual": x}
    for name, calls in state["intermediates"].items():
        output = calls["__call__"][0]
        seen[names[name]] = output[0] if isinstance(output, tuple) else output  # attention returns its pool, too
    return (x, kv), seen


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(layer: DecoderLayer, variables, *arguments):
    return layer.apply(variables, *arguments)


class CausalLM(nn.Module):
    """A decoder-only transformer. A family names its layer and overrides what else it does differently.

    Attributes:
      config: sizes and constants.
      dtype: of activations and of K and V; sums and logits are float32.
      batch_invariant: whether a token's hidden state and logits are the same bits in any batch, cut and block size, in
        training and in serving; see `jpaged.models.batch_invariant`. Gradients are the ordinary ones.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    batch_invariant: bool = False

    layer_class: ClassVar[type[DecoderLayer]]

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, self.embedding_size, self.dtype)
        self.layers = [self.make_layer(index) for index in range(config.num_hidden_layers)]
        self.norm = self.make_norm()
        if not config.tie_word_embeddings:
            self.lm_head = Dense(config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=float32_result)

    @property
    def embedding_size(self) -> int:
        return self.config.hidden_size

    def make_layer(self, index: int) -> DecoderLayer:
        return self.layer_class(self.config, self.dtype, self.config.layer(index))

    def make_norm(self) -> nn.Module | None:
        """The norm after the last layer, if there is one."""
        return nn.RMSNorm(self.config.norm_eps, self.dtype)

    # What follows works token by token; families override it. `_by_token` calls it, batch-invariant or not.

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer sees: int32 [...], int32 [...] -> [..., E]."""
        return self.embed_tokens(tokens)

    def angles(self, positions: jax.Array, rope: RopeConfig) -> Angles:
        return cos_sin(rope, self.config.rotary_head_dim, positions)

    def finish(self, x: jax.Array) -> jax.Array:
        """What follows the last layer: [..., E] -> [..., E]."""
        return x if self.norm is None else self.norm(x)

    def head(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., E]."""
        if self.config.tie_word_embeddings:
            return unembed(hidden, self.embed_tokens.embedding.astype(self.dtype))
        return self.lm_head(hidden)

    def _by_token(self, lead: int, method: str, *rows: jax.Array, **static):
        """method(*rows, **static), for arrays whose first `lead` axes count tokens."""
        if not self.batch_invariant or self.is_initializing():
            return getattr(self, method)(*rows, **static)
        alone = self.clone(name=None, parent=None, batch_invariant=False)
        params = {name: leaves for name, leaves in self.variables["params"].items() if not name.startswith("layers_")}

        def apply(params, *rows):
            return alone.apply({"params": params}, *rows, **static, method=method)

        return in_tiles(apply, lead, params, *rows)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        pool: Pool | None = None,
        layout: PagedLayout | GroupedLayout | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """The final hidden states, normed.

        Args:
          tokens: int32 [B, T] without a pool, [T] with one.
          positions: int32, like tokens; None: 0, 1, 2, ... along the last axis.
          pool: the paged KV cache, one array a layer, or for one layer of each group. None: the tokens attend to each
            other, causally.
          layout: where the tokens' K and V go, and what they attend to. Needed with a pool.

        Returns: (hidden [*tokens.shape, E], pool with the tokens' K and V written, or None).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        by_token = functools.partial(self._by_token, tokens.ndim)
        x = by_token("embed", tokens, positions)
        ropes = {layer.layer.rope for layer in self.layers}
        angles = {rope: rope and by_token("angles", positions, rope=rope) for rope in ropes}
        arrays: list[KV | None] = [None] * len(self.layers) if pool is None else list(pool)
        for i, layer in enumerate(self.layers):
            array, its_layout = (i, None) if layout is None else layout.of_layer(i)
            x, arrays[array] = self._run(layer, x, angles[layer.layer.rope], arrays[array], its_layout)
        return by_token("finish", x), None if pool is None else tuple(kv for kv in arrays if kv is not None)

    def _run(self, layer: DecoderLayer, *arguments):
        if self.is_initializing():
            return layer(*arguments)
        # As a jitted function of its parameters, one layer is traced for all: 30 of them take seconds otherwise.
        alone = layer.clone(name=None, parent=None)
        if not self.is_mutable_collection("intermediates"):
            if self.batch_invariant:
                return batch_invariant.apply_layer(alone, layer.variables, *arguments)
            return _apply_layer(alone, layer.variables, *arguments)
        output, seen = _watch_layer(alone, layer.variables, *arguments)
        for site, activations in seen.items():
            self.sow("intermediates", site, activations)
        return output

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., E]."""
        return self._by_token(hidden.ndim - 1, "head", hidden)

    def forward_logits(self, tokens: jax.Array) -> jax.Array:
        """The training forward pass: int32 [B, T] -> float32 logits [B, T, V]. Also what `init` is called with."""
        return self.logits(self(tokens)[0])

    def token_logprobs(self, tokens: jax.Array) -> jax.Array:
        """log p(token | those before it) of int32 tokens [B, T], from the second on: float32 [B, T - 1]."""
        logits = self.logits(self(tokens)[0][:, :-1])
        high, rest = batch_invariant.log_normaliser(logits)
        return (jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1) - high - rest)[..., 0]
