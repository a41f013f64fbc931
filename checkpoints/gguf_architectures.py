"""What differs between the architectures of llama.cpp that jpaged reads from GGUF files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Getter = Callable[..., Any]
"""get(key, default=None): a value of the architecture's metadata."""

_MODULES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
_HEAD_NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One value of `general.architecture`."""

    model_type: str
    """What Hugging Face calls it."""

    modules: Mapping[str, str] = field(default_factory=lambda: _MODULES)
    """Our name of a module -> llama.cpp's."""

    rotates_neighbours: bool = False
    """True: rows of q and k are in another order, so that RoPE turns (2i, 2i + 1) instead of (i, i + D/2)."""

    norm_offset: int = 0
    """Files hold the norms' scales plus this."""

    more: Callable[[Getter], dict[str, Any]] = lambda get: {}
    """Keys of Hugging Face's configuration beyond the common ones."""

    def name(self, path: tuple[str, ...]) -> str:
        """llama.cpp's name of a leaf of our tree."""
        block = f"blk.{path[0].removeprefix('layers_')}." if path[0].startswith("layers_") else ""
        return f"{block}{self.modules[path[-2]]}.{'bias' if path[-1] == 'bias' else 'weight'}"


def _gemma(largest: int) -> Callable[[Getter], dict[str, Any]]:
    """llama.cpp knows the one model whose scale differs by its number of layers, and so do we."""

    def more(get: Getter) -> dict[str, Any]:
        scalar, hidden, heads = get("attention.key_length"), get("embedding_length"), get("attention.head_count")
        if get("block_count") == largest and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            scalar = hidden / heads
        return {
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": get("attn_logit_softcapping"),
            "final_logit_softcapping": get("final_logit_softcapping"),
            "rope_local_base_freq": get("rope.freq_base_swa"),
        }

    return more


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", rotates_neighbours=True),  # Mistral, too
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3", modules=_MODULES | _HEAD_NORMS),
    "gemma2": Architecture(
        model_type="gemma2", modules=_MODULES | _GEMMA_NORMS, norm_offset=1, more=_gemma(largest=46)
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        modules=_MODULES | _GEMMA_NORMS | _HEAD_NORMS,
        norm_offset=1,
        more=_gemma(largest=62),
    ),
}
"""By `general.architecture`."""
