"""Mixtures of experts: Mixtral, Qwen 3 MoE, GPT-OSS."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jpaged.models.config.base import FULL, SLIDING, ModelConfig
from jpaged.models.config.llama import Qwen3Config
from jpaged.models.config.values import (
    MAX_EXPERTS,
    MAX_EXPERTS_IN_ALL,
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfigError,
    Reader,
)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ModelConfig):
    """A model whose MLPs are mixtures of experts, in all layers or in some."""

    aliases: ClassVar = {"num_experts": "num_local_experts"}

    num_local_experts: int
    """Experts of a layer, X."""

    num_experts_per_tok: int
    """Experts that work on a token."""

    moe_intermediate_size: int
    """Width of an expert."""

    norm_topk_prob: bool = True
    """True: the weights of a token's experts add up to one."""

    def is_sparse(self, index: int) -> bool:
        """True if a layer's MLP is a mixture of experts."""
        return True

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        experts = read.size("num_local_experts", maximum=MAX_EXPERTS)
        if experts * fields["num_hidden_layers"] > MAX_EXPERTS_IN_ALL:
            raise ModelConfigError(
                f"{fields['num_hidden_layers']} layers of {experts} experts are beyond the limit of "
                f"{MAX_EXPERTS_IN_ALL} experts in all"
            )
        return fields | {
            "num_local_experts": experts,
            "num_experts_per_tok": read.size("num_experts_per_tok", maximum=experts),
            "moe_intermediate_size": read.size(
                "moe_intermediate_size", maximum=MAX_WIDTH, default=fields["intermediate_size"]
            ),
            "norm_topk_prob": read.flag("norm_topk_prob", default=True),
        }


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(MoEConfig):
    """Mixtral."""

    defaults: ClassVar = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
    }


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(MoEConfig, Qwen3Config):
    """Qwen 3 with experts; some layers may keep a plain MLP."""

    defaults: ClassVar = {
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    }

    decoder_sparse_step: int = 1
    """The last of each so many layers has experts."""

    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts, whatever `decoder_sparse_step` says."""

    def is_sparse(self, index: int) -> bool:
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        plain = read.get("mlp_only_layers") or ()
        if not isinstance(plain, list | tuple) or not all(type(i) is int for i in plain) or len(plain) > MAX_LAYERS:
            raise ModelConfigError(f"config['mlp_only_layers'] must be a list of layer numbers, got {plain!r:.200}")
        # Unlike in Qwen 3, the window holds in all layers or in none.
        return fields | {
            "layer_types": (),
            "decoder_sparse_step": read.size("decoder_sparse_step", maximum=MAX_LAYERS, default=1),
            "mlp_only_layers": tuple(plain),
        }


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MoEConfig):
    """GPT-OSS (arXiv 2508.10925): attention sinks, clamped experts with biases, every other layer has a window."""

    defaults: ClassVar = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }

    swiglu_alpha: float = 1.702
    """Steepness of the gate's sigmoid."""

    swiglu_limit: float = 7.0
    """The experts' activations are clamped to this."""

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        fields = super()._fields(read)
        alternating = tuple(FULL if i % 2 else SLIDING for i in range(fields["num_hidden_layers"]))
        return fields | {
            "layer_types": fields["layer_types"] or alternating,
            "swiglu_alpha": read.number("swiglu_alpha", default=1.702, low=0.0, high=1e6),
            "swiglu_limit": read.number("swiglu_limit", default=7.0, low=0.0, high=1e6),
        }
