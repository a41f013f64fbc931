"""Qwen 2 and 2.5: Llama with biases on q, k and v (arXiv 2407.10671)."""

from jpaged.models.causal_lm import CausalLM
from jpaged.models.layers import Attention
from jpaged.models.llama import LlamaLayer


class Qwen2Attention(Attention):
    """Biases on q, k and v, whatever the configuration says."""

    input_bias = True
    output_bias = False


class Qwen2Layer(LlamaLayer):
    """Llama's, with these biases."""

    attention_class = Qwen2Attention


class Qwen2ForCausalLM(CausalLM):
    """Qwen 2."""

    layer_class = Qwen2Layer
