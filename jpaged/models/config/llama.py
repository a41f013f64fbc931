"""Llama and the families that are Llama with small differences."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from jpaged.models.config.base import FULL, SLIDING, LayerConfig, ModelConfig
from jpaged.models.config.values import MAX_LAYERS, ModelConfigError, Reader


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama 1 to 3, SmolLM2."""


@dataclass(frozen=True, kw_only=True)
class MistralConfig(ModelConfig):
    """Mistral: Llama with a sliding window."""

    defaults: ClassVar = {"sliding_window": 4096, "num_key_value_heads": 8}


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """Qwen 2 and 2.5. Their files give a window that counts only if `use_sliding_window` says so."""

    defaults: ClassVar = {"sliding_window": 4096}

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        if not read.flag("use_sliding_window"):
            return fields | {"sliding_window": None}
        full = read.count("max_window_layers", maximum=MAX_LAYERS, default=28)
        types = tuple(SLIDING if i >= full else FULL for i in range(fields["num_hidden_layers"]))
        return fields | {"layer_types": fields["layer_types"] or types}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen 3: q and k are normed head by head."""

    defaults: ClassVar = {"sliding_window": 4096, "head_dim": 128}


@dataclass(frozen=True, kw_only=True)
class Phi3Config(ModelConfig):
    """Phi 3 and 4: q, k, v in one projection, gate and up in another."""

    defaults: ClassVar = {"rms_norm_eps": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(ModelConfig):
    """OLMo 2: norms behind the blocks instead of before them, and on the whole of q and k."""

    defaults: ClassVar = {"rms_norm_eps": 1e-5}


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(ModelConfig):
    """Granite: Llama with four multipliers."""

    embedding_multiplier: float = 1.0
    """Factor on the embeddings."""

    residual_multiplier: float = 1.0
    """Factor on what attention and MLP add to the residual stream."""

    attention_multiplier: float = 1.0
    """Factor on the products of queries and keys, in place of D ** -0.5."""

    logits_scaling: float = 1.0
    """Divisor of the logits."""

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        return super()._fields(read) | {name: read.number(name, default=1.0, low=0.0, high=1e6) for name in names}


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(Qwen2Config):
    """SmolLM 3: Llama with layers that see no positions (NoPE, arXiv 2501.18795)."""

    defaults: ClassVar = {"tie_word_embeddings": True, "rope_theta": 2e6}

    rotated_layers: tuple[bool, ...] = ()
    """False for the layers that see no positions (Hugging Face's `no_rope_layers`, which means the opposite)."""

    def layer(self, index: int) -> LayerConfig:
        layer = super().layer(index)
        return layer if self.rotated_layers[index] else dataclasses.replace(layer, rope=None)

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        layers = fields["num_hidden_layers"]
        rotated = read.get("no_rope_layers")
        if rotated is None:
            interval = read.size("no_rope_layer_interval", maximum=MAX_LAYERS, default=4)
            rotated = [int((i + 1) % interval != 0) for i in range(layers)]
        if not isinstance(rotated, list | tuple) or len(rotated) != layers or any(x not in (0, 1) for x in rotated):
            raise ModelConfigError(f"config['no_rope_layers'] must be a list of {layers} zeros and ones")
        if fields["sliding_window"] is not None and read.get("layer_types") is None:
            fields["layer_types"] = tuple(FULL if r else SLIDING for r in rotated)
        return fields | {"rotated_layers": tuple(map(bool, rotated))}


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(ModelConfig):
    """StarCoder 2: LayerNorm, biases, a plain MLP."""

    aliases: ClassVar = {"norm_epsilon": "rms_norm_eps", "use_bias": "attention_bias"}
    defaults: ClassVar = {
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
    }

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        return fields | {"mlp_bias": fields["attention_bias"]}
