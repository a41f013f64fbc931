"""Which module serves which family."""

import flax.linen as nn
import jax.numpy as jnp

from jpaged.models.config import ModelConfig, UnsupportedModelError
from jpaged.models.deepseek_v3 import DeepseekV3ForCausalLM
from jpaged.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from jpaged.models.gpt2 import GPT2LMHeadModel
from jpaged.models.gpt_neox import GPTNeoXForCausalLM
from jpaged.models.gpt_oss import GptOssForCausalLM
from jpaged.models.granite import GraniteForCausalLM
from jpaged.models.llama import LlamaForCausalLM
from jpaged.models.mixtral import MixtralForCausalLM
from jpaged.models.olmo2 import Olmo2ForCausalLM
from jpaged.models.opt import OPTForCausalLM
from jpaged.models.phi3 import Phi3ForCausalLM
from jpaged.models.qwen2 import Qwen2ForCausalLM
from jpaged.models.qwen3 import Qwen3ForCausalLM
from jpaged.models.qwen3_moe import Qwen3MoeForCausalLM
from jpaged.models.starcoder2 import Starcoder2ForCausalLM

MODULES: dict[str, type[nn.Module]] = {
    "llama": LlamaForCausalLM,
    "mistral": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "phi3": Phi3ForCausalLM,
    "olmo2": Olmo2ForCausalLM,
    "granite": GraniteForCausalLM,
    "smollm3": LlamaForCausalLM,  # its layers without positions are the configuration's matter
    "starcoder2": Starcoder2ForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gemma3_text": Gemma3ForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "opt": OPTForCausalLM,
    "gpt_neox": GPTNeoXForCausalLM,
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "gpt_oss": GptOssForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
}


def build(config: ModelConfig, dtype: jnp.dtype) -> nn.Module:
    """The module of a configuration.

    Raises:
      UnsupportedModelError: no module serves this family; the message lists those that do.
    """
    if config.model_type not in MODULES:
        raise UnsupportedModelError(
            f"no module for model_type {config.model_type!r}; there are modules for {', '.join(MODULES)}."
        )
    return MODULES[config.model_type](config, dtype)
