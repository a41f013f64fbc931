"""DeepSeek-V3 (arXiv 2412.19437): multi-head latent attention, shared and routed experts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from jpaged.models.config.moe import MoEConfig
from jpaged.models.config.rope import RopeConfig, rope_from_hf
from jpaged.models.config.values import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, ModelConfigError, Reader


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(MoEConfig):
    """DeepSeek-V3 and R1. `head_dim` is that of queries and keys, the rotated part included."""

    aliases: ClassVar = {"n_routed_experts": "num_local_experts"}
    defaults: ClassVar = {"num_local_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}

    q_lora_rank: int | None
    """Width of the compressed queries; None: they are not compressed."""

    kv_lora_rank: int
    """Width of the latent that keys and values are made of: what the pool holds, beside the rotated key."""

    qk_nope_head_dim: int
    """Part of a query or key head that is not rotated."""

    qk_rope_head_dim: int
    """Part that is; all heads share one such key."""

    v_head_dim: int
    """Width of a value head."""

    n_shared_experts: int
    """Experts that work on every token, as one wide MLP."""

    n_group: int
    """Groups that the routed experts are divided into."""

    topk_group: int
    """Groups that a token's experts may come from."""

    routed_scaling_factor: float
    """Factor on the routed experts' weights."""

    first_k_dense_replace: int
    """So many layers at the bottom have a plain MLP."""

    rope_interleave: bool = True
    """True: neighbours (2i, 2i + 1) are rotated together, not halves."""

    num_nextn_predict_layers: int = 0
    """Layers of the checkpoint above the last one that predict further tokens; they are not loaded."""

    def is_sparse(self, index: int) -> bool:
        return index >= self.first_k_dense_replace

    @property
    def attention_scale(self) -> float:
        scale, rope = self.head_dim**-0.5, self.rope
        if rope is None or rope.rope_type == "default" or not rope.mscale_all_dim or (rope.factor or 1) <= 1:
            return scale
        return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor or 1) + 1.0) ** 2

    @property
    def rotary_head_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return 1, 1, self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def _fields(cls, read: Reader) -> dict[str, Any]:
        nope, rope, value, rank = (
            read.size(name, maximum=MAX_WIDTH, default=default)
            for name, default in (
                ("qk_nope_head_dim", 128),
                ("qk_rope_head_dim", 64),
                ("v_head_dim", 128),
                ("kv_lora_rank", 512),
            )
        )
        # Files give the rotated part or nothing as head_dim.
        fields = super()._fields(Reader({**read.values, "head_dim": nope + rope}, "config"))
        experts = fields["num_local_experts"]
        groups = read.size("n_group", maximum=MAX_EXPERTS, default=8)
        if experts % groups or experts // groups < 2:
            raise ModelConfigError(f"n_routed_experts = {experts} must be n_group = {groups} groups of at least 2")
        chosen = read.size("topk_group", maximum=groups, default=4)
        if fields["num_experts_per_tok"] > chosen * (experts // groups):
            raise ModelConfigError(f"{chosen} groups have fewer than {fields['num_experts_per_tok']} experts")
        return fields | {
            "q_lora_rank": read.optional_size("q_lora_rank", maximum=MAX_WIDTH),
            "kv_lora_rank": rank,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": value,
            "n_shared_experts": read.size("n_shared_experts", maximum=MAX_EXPERTS, default=1),
            "n_group": groups,
            "topk_group": chosen,
            "routed_scaling_factor": read.number("routed_scaling_factor", default=2.5, low=0.0, high=1e6),
            "first_k_dense_replace": read.count("first_k_dense_replace", maximum=MAX_LAYERS, default=3),
            "rope_interleave": read.flag("rope_interleave", default=True),
            "num_nextn_predict_layers": read.count("num_nextn_predict_layers", maximum=MAX_LAYERS, default=0),
        }

    @classmethod
    def _rope(cls, read: Reader, head_dim: int, positions: int) -> RopeConfig | None:
        rotated = read.size("qk_rope_head_dim", maximum=MAX_WIDTH, default=64)
        return rope_from_hf(read.values, rotated, positions)
