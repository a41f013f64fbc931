"""Mixtral: Llama whose MLPs are mixtures of experts (arXiv 2401.04088)."""

from jpaged.models.causal_lm import CausalLM
from jpaged.models.llama import LlamaLayer
from jpaged.models.moe import SparseMLP


class MixtralLayer(LlamaLayer):
    """Llama's, with experts."""

    mlp_class = SparseMLP


class MixtralForCausalLM(CausalLM):
    """Mixtral."""

    layer_class = MixtralLayer
