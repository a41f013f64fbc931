"""Mixtral: Llama whose MLPs are mixtures of experts (arXiv 2401.04088)."""

from jpaged.models.causal_lm import CausalLM
from jpaged.models.llama import LlamaLayer
from jpaged.models.moe import SparseMLP


class MixtralLayer(LlamaLayer):
    mlp_class = SparseMLP


class MixtralForCausalLM(CausalLM):
    layer_class = MixtralLayer
