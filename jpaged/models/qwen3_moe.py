"""Qwen 3 with experts: in all layers, or in some (arXiv 2505.09388)."""

from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import Qwen3MoeConfig
from jpaged.models.layers import DecoderLayer
from jpaged.models.moe import SparseMLP
from jpaged.models.qwen3 import Qwen3Layer


class Qwen3SparseLayer(Qwen3Layer):
    """Qwen 3's, with experts."""

    mlp_class = SparseMLP


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen 3 MoE."""

    config: Qwen3MoeConfig

    def make_layer(self, index: int) -> DecoderLayer:
        layer_class = Qwen3SparseLayer if self.config.is_sparse(index) else Qwen3Layer
        return layer_class(self.config, self.dtype, self.config.layer(index))
