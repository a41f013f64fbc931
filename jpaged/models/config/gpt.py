"""GPT-2, OPT and GPT-NeoX: LayerNorm, biases, a plain MLP."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jpaged.models.config.base import ModelConfig
from jpaged.models.config.rope import RopeConfig
from jpaged.models.config.values import MAX_WIDTH, Reader


@dataclass(frozen=True, kw_only=True)
class LearnedPositionsConfig(ModelConfig):
    """Families whose positions are learned vectors, added to the embeddings."""

    @classmethod
    def _rope(cls, read: Reader, head_dim: int, positions: int) -> RopeConfig | None:
        return None


@dataclass(frozen=True, kw_only=True)
class GPT2Config(LearnedPositionsConfig):
    """GPT-2."""

    aliases: ClassVar = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    }
    defaults: ClassVar = {
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    }

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        read.refuse("scale_attn_weights", True)
        read.refuse("scale_attn_by_inverse_layer_idx", False)
        read.refuse("add_cross_attention", False)
        if read.get("intermediate_size") is None:
            hidden = read.size("hidden_size", maximum=MAX_WIDTH // 4)
            read = Reader({**read.values, "intermediate_size": 4 * hidden}, "config")
        return super()._fields(read)


@dataclass(frozen=True, kw_only=True)
class OPTConfig(LearnedPositionsConfig):
    """OPT. The 350M model differs: its norms come behind the blocks and its embeddings are narrow and projected."""

    aliases: ClassVar = {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "enable_bias": "attention_bias",
    }
    defaults: ClassVar = {
        "tie_word_embeddings": True,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,  # not in the file: PyTorch's
        "attention_bias": True,
    }

    do_layer_norm_before: bool = True
    """False: norms come behind the residual additions, and there is no final norm."""

    word_embed_proj_dim: int = 0
    """Width of the embeddings; projected to `hidden_size` and back where it differs."""

    final_norm: bool = True
    """True: a norm after the last layer."""

    @property
    def projects_embeddings(self) -> bool:
        return self.word_embed_proj_dim != self.hidden_size

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        read.refuse("layer_norm_elementwise_affine", True)
        fields = super()._fields(read)
        before = read.flag("do_layer_norm_before", default=True)
        return fields | {
            "mlp_bias": fields["attention_bias"],
            "do_layer_norm_before": before,
            "word_embed_proj_dim": read.size("word_embed_proj_dim", maximum=MAX_WIDTH, default=fields["hidden_size"]),
            "final_norm": before and not read.flag("_remove_final_layer_norm"),
        }


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """GPT-NeoX and Pythia: a quarter of each head is rotated; attention and MLP work side by side."""

    aliases: ClassVar = {
        "layer_norm_eps": "rms_norm_eps",
        "rotary_pct": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta",
    }
    defaults: ClassVar = {
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
        "partial_rotary_factor": 0.25,
    }

    use_parallel_residual: bool = True
    """False: the MLP sees what attention has added, as in other families."""

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        return super()._fields(read) | {"use_parallel_residual": read.flag("use_parallel_residual", default=True)}
