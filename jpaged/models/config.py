"""What a model is, in numbers: the configuration of a decoder-only transformer, without JAX.

Names are Hugging Face's `config.json` names, so that a reader of one knows the other. `ModelConfig.from_hf`
is the only door for untrusted values: whatever it returns is finite, positive, divisible where it must be,
and bounded, so that nothing downstream checks again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from jpaged.models.config_values import ModelConfigError, Reader, UnsupportedModelError, token_ids

__all__ = ["ModelConfig", "ModelConfigError", "RopeConfig", "UnsupportedModelError", "token_ids"]

SUPPORTED_MODEL_TYPES = ("llama", "mistral")
"""Families that `ModelConfig.from_hf` accepts. A new family is added here and in the model registry."""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""Rotary-embedding variants, named as in Hugging Face's `modeling_rope_utils.py`."""

SUPPORTED_ACTIVATIONS = ("silu",)
"""Values of `hidden_act` that the models know ("swish" is read as "silu")."""

# Far above every published model, far below what would exhaust memory before anybody notices a corrupt
# number.
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 23
_MAX_LAYERS = 4096
_MAX_HEADS = 4096
_MAX_POSITIONS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, in the half-rotation ("rotate_half") convention of Hugging Face.

    Only the fields that `rope_type` uses are set; the others stay at their defaults.
    """

    rope_type: str = "default"
    """One of `ROPE_TYPES`."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""

    factor: float | None = None
    """Context extension factor, >= 1; None for default. Where yarn or longrope leave it out, it is filled in:
    max_position_embeddings / original_max_position_embeddings."""

    original_max_position_embeddings: int | None = None
    """Context length of pre-training, in tokens. Always set when rope_type is neither default nor linear."""

    low_freq_factor: float | None = None
    """llama3: frequencies with wavelengths beyond original context / this are divided by `factor`."""

    high_freq_factor: float | None = None
    """llama3: frequencies with wavelengths below original context / this are left alone."""

    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a dimension is left alone."""

    beta_slow: float = 1.0
    """yarn: rotations over the original context below which a dimension is interpolated fully."""

    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions."""

    attention_factor: float | None = None
    """yarn, longrope: multiplies cos and sin. None: derived from `factor` (and mscale), as the papers do."""

    mscale: float | None = None
    """yarn (DeepSeek): numerator of the derived attention factor."""

    mscale_all_dim: float | None = None
    """yarn (DeepSeek): denominator of the derived attention factor."""

    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency up to the original context length; rotary dimension / 2 values."""

    long_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency beyond the original context length; rotary dimension / 2 values."""

    partial_rotary_factor: float = 1.0
    """Share of head_dim that is rotated, in (0, 1]; the rest passes through."""

    def rotary_dim(self, head_dim: int) -> int:
        """Number of leading dimensions of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer of the Llama kind."""

    model_type: str
    """Family, one of `SUPPORTED_MODEL_TYPES`."""

    vocab_size: int
    """Rows of the embedding, V."""

    hidden_size: int
    """Width of the residual stream, E."""

    intermediate_size: int
    """Width of the gated MLP, F."""

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

    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    hidden_act: str = "silu"
    """Activation of the MLP's gate, one of `SUPPORTED_ACTIVATIONS`."""

    tie_word_embeddings: bool = False
    """True: logits use the embedding's transpose and there is no lm_head leaf."""

    attention_bias: bool = False
    """True: q, k, v and o projections have a bias."""

    mlp_bias: bool = False
    """True: gate, up and down projections have a bias."""

    sliding_window: int | None = None
    """A token sees itself and at most this many - 1 tokens before it. None: full causal attention."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""

    bos_token_id: int | None = None
    """Beginning of sequence."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""

    pad_token_id: int | None = None
    """Padding."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Builds a configuration from the contents of a Hugging Face `config.json`.

        Both spellings of RoPE are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
        (transformers 5). Absent keys take the defaults of Hugging Face's LlamaConfig and MistralConfig.

        Raises:
            UnsupportedModelError: another family, activation or RoPE variant than the supported ones.
                ModelConfigError: a value is missing, of the wrong type, not finite, out of range, or
                contradicts another.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not supported; supported families: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        read = Reader(config, "config")
        heads = read.size("num_attention_heads", maximum=_MAX_HEADS)
        hidden = read.size("hidden_size", maximum=_MAX_WIDTH)
        kv_heads = read.size("num_key_value_heads", maximum=_MAX_HEADS, default=8 if model_type == "mistral" else heads)
        if heads % kv_heads:
            raise ModelConfigError(
                f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}"
            )
        if config.get("head_dim") is None and hidden % heads:
            raise ModelConfigError(
                f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; give head_dim"
            )
        head_dim = read.size("head_dim", maximum=_MAX_WIDTH, default=hidden // heads)
        positions = read.size("max_position_embeddings", maximum=_MAX_POSITIONS)
        vocab = read.size("vocab_size", maximum=_MAX_VOCAB)
        return cls(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size", maximum=_MAX_WIDTH),
            num_hidden_layers=read.size("num_hidden_layers", maximum=_MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6, low=0.0, high=1.0),
            hidden_act=_activation(config.get("hidden_act", "silu")),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            mlp_bias=read.flag("mlp_bias"),
            sliding_window=read.optional_size("sliding_window", maximum=_MAX_POSITIONS),
            rope=_rope_from_hf(config, head_dim, positions),
            bos_token_id=_single_token(config, "bos_token_id", vocab),
            eos_token_ids=token_ids(config.get("eos_token_id"), "eos_token_id", vocab),
            pad_token_id=_single_token(config, "pad_token_id", vocab),
        )


def _single_token(config: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    # Published configurations say "no such token" with null or with -1.
    value = config.get(name)
    ids = () if value == -1 else token_ids(value, name, vocab_size)
    return ids[0] if ids else None


def _activation(value: Any) -> str:
    name = "silu" if value == "swish" else value
    if name not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {value!r} is not supported; supported: {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    return name


def _rope_from_hf(config: Mapping[str, Any], head_dim: int, positions: int) -> RopeConfig:
    """Joins the old and the new spelling of RoPE into one checked `RopeConfig`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ModelConfigError(f"rope_parameters must be an object, got {type(given).__name__}")
    outer = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    rope = {**outer, **{key: value for key, value in given.items() if value is not None}}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "su":  # the name under which Phi-3 first published longrope
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")

    read = Reader(rope, "rope_parameters")
    partial = read.number("partial_rotary_factor", default=1.0, low=0.0, high=1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelConfigError(
            f"the rotated part of a head must be even and positive, got {rotary_dim} of head_dim = {head_dim}"
        )
    common = {"rope_type": rope_type, "theta": read.number("rope_theta", default=10000.0, low=0.0, high=1e15)}
    if rope_type == "default":
        return RopeConfig(**common, partial_rotary_factor=partial)
    # Phi-3 writes the original length at the top level; that one wins, as in Hugging Face.
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return RopeConfig(**common, **_scaling(read, rope_type, rotary_dim // 2, positions), partial_rotary_factor=partial)


def _scaling(read: Reader, rope_type: str, frequencies: int, positions: int) -> dict[str, Any]:
    """The fields that belong to one kind of scaling; `frequencies` is the rotary dimension / 2."""
    if rope_type == "linear":
        return {"factor": read.number("factor", low=1.0, high=1e6)}
    original = read.size("original_max_position_embeddings", maximum=_MAX_POSITIONS, default=positions)
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    implied = max(1.0, positions / original) if rope_type in ("yarn", "longrope") else None
    fields["factor"] = read.number("factor", default=implied, low=1.0, high=1e6)
    if rope_type == "llama3":
        low = fields["low_freq_factor"] = read.number("low_freq_factor", low=0.0, high=1e6)
        high = fields["high_freq_factor"] = read.number("high_freq_factor", low=0.0, high=1e6)
        if high <= low:
            raise ModelConfigError(f"high_freq_factor = {high} must be greater than low_freq_factor = {low}")
    if rope_type in ("yarn", "longrope"):
        fields["attention_factor"] = read.optional_number("attention_factor", low=0.0, high=1e6)
    if rope_type == "yarn":
        fields["beta_fast"] = read.number("beta_fast", default=32.0, low=0.0, high=1e6)
        fields["beta_slow"] = read.number("beta_slow", default=1.0, low=0.0, high=1e6)
        fields["mscale"] = read.optional_number("mscale", low=0.0, high=1e6)
        fields["mscale_all_dim"] = read.optional_number("mscale_all_dim", low=0.0, high=1e6)
        fields["truncate"] = read.flag("truncate", default=True)
    if rope_type == "longrope":
        fields["short_factor"] = read.numbers("short_factor", frequencies)
        fields["long_factor"] = read.numbers("long_factor", frequencies)
    return fields
