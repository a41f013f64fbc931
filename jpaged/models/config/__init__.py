"""What a model is, in numbers: one frozen dataclass per family, without JAX.

`config_from_hf` is the only door for untrusted values: whatever it returns is finite, positive, divisible where it
must be, and bounded, so that nothing downstream checks again.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.config.base import FULL, SLIDING, LayerConfig, ModelConfig
from jpaged.models.config.deepseek import DeepseekV3Config
from jpaged.models.config.gemma import Gemma2Config, Gemma3Config
from jpaged.models.config.gpt import GPT2Config, GPTNeoXConfig, OPTConfig
from jpaged.models.config.layer_groups import LayerGroups
from jpaged.models.config.llama import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)
from jpaged.models.config.moe import GptOssConfig, MixtralConfig, MoEConfig, Qwen3MoeConfig
from jpaged.models.config.rope import RopeConfig
from jpaged.models.config.values import ModelConfigError, UnsupportedModelError, token_ids

__all__ = [
    "FAMILIES",
    "FULL",
    "SLIDING",
    "DeepseekV3Config",
    "GPT2Config",
    "GPTNeoXConfig",
    "Gemma2Config",
    "Gemma3Config",
    "GptOssConfig",
    "GraniteConfig",
    "LayerConfig",
    "LayerGroups",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelConfigError",
    "OPTConfig",
    "Olmo2Config",
    "Phi3Config",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "RopeConfig",
    "SmolLM3Config",
    "Starcoder2Config",
    "UnsupportedModelError",
    "config_from_hf",
    "token_ids",
]

FAMILIES: dict[str, type[ModelConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "olmo2": Olmo2Config,
    "granite": GraniteConfig,
    "smollm3": SmolLM3Config,
    "starcoder2": Starcoder2Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3Config,
    "gpt2": GPT2Config,
    "opt": OPTConfig,
    "gpt_neox": GPTNeoXConfig,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "gpt_oss": GptOssConfig,
    "deepseek_v3": DeepseekV3Config,
}
"""`model_type` -> configuration. A new family is added here, in the model registry and in `checkpoints.tables`."""


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration of whatever family a Hugging Face `config.json` names; see `ModelConfig.from_hf`.

    Raises:
        UnsupportedModelError: another family, or an option of it that is not implemented.
        ModelConfigError: a value is missing, of the wrong type, not finite, out of range, or contradicts another.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type].from_hf(config)
