"""Rotary position embedding in numbers: every scaling variant, in the old and the new spelling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpaged.models.config.values import MAX_POSITIONS, ModelConfigError, Reader, UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""Rotary-embedding variants, named as in Hugging Face's `modeling_rope_utils.py`."""


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


def rope_from_hf(config: Mapping[str, Any], head_dim: int, positions: int) -> RopeConfig:
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
    original = read.size("original_max_position_embeddings", maximum=MAX_POSITIONS, default=positions)
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
