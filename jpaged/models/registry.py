"""Which module serves which family."""

import flax.linen as nn
import jax.numpy as jnp

from jpaged.models.config import ModelConfig, UnsupportedModelError
from jpaged.models.llama import LlamaForCausalLM

FAMILIES: dict[str, type[nn.Module]] = {
    "llama": LlamaForCausalLM,
    "mistral": LlamaForCausalLM,
}


def build(config: ModelConfig, dtype: jnp.dtype) -> nn.Module:
    """The module of a configuration.

    Raises:
      UnsupportedModelError: no module serves this family; the message lists those that do.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"no module for model_type {config.model_type!r}; there are modules for {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type](config, dtype)
