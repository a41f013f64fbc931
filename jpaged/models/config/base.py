"""What every decoder-only transformer has in numbers, and how a Hugging Face `config.json` is read.

A family is a subclass: it adds fields, names the keys that it spells differently (`aliases`), gives Hugging Face's
defaults for keys that files leave out (`defaults`), and overrides what it derives from them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from jpaged.models.config.layer_groups import LayerGroups
from jpaged.models.config.rope import RopeConfig, rope_from_hf
from jpaged.models.config.values import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ModelConfigError,
    Reader,
    UnsupportedModelError,
    token_ids,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""Values of `hidden_act`, and what we call them."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""Values of `layer_types`."""


@dataclass(frozen=True)
class LayerConfig:
    """What one layer may do differently from the next. Layers with equal ones are traced once."""

    sliding_window: int | None
    """A token sees itself and at most this many - 1 tokens before it. None: all tokens before it."""

    rope: RopeConfig | None
    """How its queries and keys are rotated. None: they are not."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer. Names are those of Hugging Face's `config.json`."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Name in this family's `config.json` -> name here."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Hugging Face's values for absent keys, where they differ from the fields' defaults below."""

    model_type: str
    """Family, one of `jpaged.models.config.FAMILIES`."""

    vocab_size: int
    """Rows of the embedding, V."""

    hidden_size: int
    """Width of the residual stream, E."""

    intermediate_size: int
    """Width of the MLP, F."""

    num_hidden_layers: int
    """Number of transformer blocks, L."""

    num_attention_heads: int
    """Query heads, Hq."""

    num_key_value_heads: int
    """Key and value heads, Hkv; divides Hq."""

    head_dim: int
    """Width of one head, D; Hq * D need not equal E."""

    max_position_embeddings: int
    """Longest context in tokens."""

    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""

    hidden_act: str = "silu"
    """Activation of the MLP, one of the values of `ACTIVATIONS`."""

    tie_word_embeddings: bool = False
    """True: logits use the embedding's transpose and there is no lm_head leaf."""

    attention_bias: bool = False
    """True: the attention's projections have a bias."""

    mlp_bias: bool = False
    """True: the MLP's projections have a bias."""

    sliding_window: int | None = None
    """Window of the layers that have one, in tokens. None: full causal attention everywhere."""

    layer_types: tuple[str, ...] = ()
    """`SLIDING` or `FULL` for each layer; empty: all layers have the window, if there is one."""

    rope: RopeConfig | None = field(default_factory=RopeConfig)
    """Rotary position embedding. None: positions are learned vectors."""

    bos_token_id: int | None = None
    """Beginning of sequence."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""

    pad_token_id: int | None = None
    """Padding."""

    def layer(self, index: int) -> LayerConfig:
        """What is special about a layer."""
        slides = not self.layer_types or self.layer_types[index] == SLIDING
        return LayerConfig(self.sliding_window if slides else None, self.rope)

    def layer_groups(self, max_model_len: int) -> LayerGroups:
        """The layers by kind of window, for sequences of at most so many tokens: a window that none leaves is none."""
        windows = [self.layer(index).sliding_window for index in range(self.num_hidden_layers)]
        return LayerGroups.of([w if w is not None and w < max_model_len else None for w in windows])

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.head_dim**-0.5

    @property
    def rotary_head_dim(self) -> int:
        """Width of the part of a head that RoPE is told of."""
        return self.head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """What a layer keeps of a token: (2: keys and values, or 1: keys that are values too; heads; width)."""
        return 2, self.num_key_value_heads, self.head_dim

    def for_length(self, max_model_len: int) -> Self:
        """The configuration for sequences of at most so many tokens.

        Only longrope cares: it has one set of frequencies for texts that fit into the trained context and one for
        longer texts. A sequence can't change from one to the other while it grows, for its cached keys are rotated
        already, so the choice is made once.
        """
        rope = self.rope
        if rope is None or rope.rope_type != "longrope" or max_model_len > (rope.original_max_position_embeddings or 0):
            return self
        return dataclasses.replace(self, rope=dataclasses.replace(rope, long_factor=rope.short_factor))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Builds a configuration of this family from the contents of a Hugging Face `config.json`.

        Both spellings of RoPE are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
        (transformers 5). Absent keys take Hugging Face's defaults.

        Raises:
            UnsupportedModelError: another activation, RoPE variant or option than the supported ones.
            ModelConfigError: a value is missing, of the wrong type, not finite, out of range, or contradicts another.
        """
        named = {cls.aliases.get(key, key): value for key, value in config.items()}
        return cls(**cls._fields(Reader({**cls.defaults, **named}, "config")))

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        """The values of all fields."""
        heads = read.size("num_attention_heads", maximum=MAX_HEADS)
        hidden = read.size("hidden_size", maximum=MAX_WIDTH)
        kv_heads = read.size("num_key_value_heads", maximum=MAX_HEADS, default=heads)
        if heads % kv_heads:
            raise ModelConfigError(
                f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}"
            )
        if read.get("head_dim") is None and hidden % heads:
            raise ModelConfigError(
                f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; give head_dim"
            )
        head_dim = read.size("head_dim", maximum=MAX_WIDTH, default=max(hidden // heads, 1))
        positions = read.size("max_position_embeddings", maximum=MAX_POSITIONS)
        vocab = read.size("vocab_size", maximum=MAX_VOCAB)
        layers = read.size("num_hidden_layers", maximum=MAX_LAYERS)
        return {
            "model_type": read.get("model_type"),
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": read.size("intermediate_size", maximum=MAX_WIDTH),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": positions,
            "norm_eps": read.number("rms_norm_eps", default=1e-6, low=0.0, high=1.0),
            "hidden_act": _activation(read.get("hidden_act", "silu")),
            "tie_word_embeddings": read.flag("tie_word_embeddings"),
            "attention_bias": read.flag("attention_bias"),
            "mlp_bias": read.flag("mlp_bias"),
            "sliding_window": read.optional_size("sliding_window", maximum=MAX_POSITIONS),
            "layer_types": read.choices("layer_types", (SLIDING, FULL), layers),
            "rope": cls._rope(read, head_dim, positions),
            "bos_token_id": _single_token(read.get("bos_token_id"), "bos_token_id", vocab),
            "eos_token_ids": token_ids(read.get("eos_token_id"), "eos_token_id", vocab),
            "pad_token_id": _single_token(read.get("pad_token_id"), "pad_token_id", vocab),
        }

    @classmethod
    def _rope(cls, read: Reader, head_dim: int, positions: int) -> RopeConfig | None:
        return rope_from_hf(read.values, head_dim, positions)


def _single_token(value: Any, name: str, vocab_size: int) -> int | None:
    # Published configurations say "no such token" with null or with -1.
    ids = () if value == -1 else token_ids(value, name, vocab_size)
    return ids[0] if ids else None


def _activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(f"hidden_act {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]
