"""Gemma 2 and 3: norms before and behind each block, alternating windows, capped scores."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jpaged.models.config.base import FULL, SLIDING, LayerConfig, ModelConfig
from jpaged.models.config.rope import RopeConfig, rope_from_hf
from jpaged.models.config.values import MAX_LAYERS, ModelConfigError, Reader

_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "sliding_window": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(ModelConfig):
    """Gemma 2 (arXiv 2408.00118)."""

    aliases: ClassVar = {"hidden_activation": "hidden_act"}
    defaults: ClassVar = _DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    full_every: ClassVar = 2
    """Which layers see everything where the file does not list them: the last of each so many."""

    query_pre_attn_scalar: float = 256.0
    """The scores are divided by its square root."""

    attn_logit_softcapping: float | None = None
    """Cap of the attention scores."""

    final_logit_softcapping: float | None = None
    """Cap of the logits."""

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        read.refuse("use_bidirectional_attention", False)
        fields = super()._fields(read)
        every = read.size("sliding_window_pattern", maximum=MAX_LAYERS, default=cls.full_every)
        types = tuple(SLIDING if (i + 1) % every else FULL for i in range(fields["num_hidden_layers"]))
        return fields | {
            "layer_types": fields["layer_types"] or types,
            "query_pre_attn_scalar": read.number("query_pre_attn_scalar", default=256.0, low=0.0, high=1e6),
            "attn_logit_softcapping": read.optional_number("attn_logit_softcapping", low=0.0, high=1e6),
            "final_logit_softcapping": read.optional_number("final_logit_softcapping", low=0.0, high=1e6),
        }


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """Gemma 3, text (arXiv 2503.19786): norms on q and k; layers with a window have a RoPE of their own."""

    aliases: ClassVar = Gemma2Config.aliases | {"_sliding_window_pattern": "sliding_window_pattern"}
    defaults: ClassVar = _DEFAULTS | {"rope_theta": 1e6}
    full_every: ClassVar = 6

    local_rope: RopeConfig = field(default_factory=RopeConfig)
    """RoPE of the layers with a window."""

    def layer(self, index: int) -> LayerConfig:
        layer = super().layer(index)
        return layer if layer.sliding_window is None else dataclasses.replace(layer, rope=self.local_rope)

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        theta = {"rope_theta": read.get("rope_local_base_freq", 10000.0)}
        local = _rope_of(read, SLIDING) or theta
        rope = rope_from_hf({"rope_parameters": local}, fields["head_dim"], fields["max_position_embeddings"])
        return fields | {"local_rope": rope}

    @classmethod
    def _rope(cls, read: Reader, head_dim: int, positions: int) -> RopeConfig | None:
        of_full = _rope_of(read, FULL)
        values = read.values if of_full is None else {**read.values, "rope_parameters": of_full}
        return rope_from_hf(values, head_dim, positions)


def _rope_of(read: Reader, layer_type: str) -> Any:
    """`rope_parameters[layer_type]`; None in the old spelling, which has one mapping for all layers."""
    given = read.get("rope_parameters")
    if given is None or not isinstance(given, dict) or not ({SLIDING, FULL} & set(given)):
        return None
    if not isinstance(given.get(layer_type), dict):
        raise ModelConfigError(f"config['rope_parameters'][{layer_type!r}] must be an object")
    return given[layer_type]
