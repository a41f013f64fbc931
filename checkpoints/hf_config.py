"""A `ModelConfig` -> Hugging Face's `config.json`, the inverse of `config_from_hf`, for models that have none."""

import dataclasses
from typing import Any

from jpaged.models.config import FULL, SLIDING, ModelConfig, RopeConfig

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "opt": "OPTForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""Where capitals alone do not make the name."""

_NAMES = {"norm_eps": "rms_norm_eps", "eos_token_ids": "eos_token_id", "rotated_layers": "no_rope_layers"}
_SET_BY_OTHERS = ("rope", "local_rope", "final_norm")


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What `config_from_hf` reads this configuration from.

    Args:
        config: the model.
        dtype: element type of its weights.
    """
    theirs = {ours: name for name, ours in type(config).aliases.items() if not name.startswith("_")}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name not in _SET_BY_OTHERS:
            name = _NAMES.get(field.name, field.name)
            values[theirs.get(name, name)] = _plain(getattr(config, field.name))
    if not values.get("layer_types"):
        values.pop("layer_types", None)
    if "no_rope_layers" in values:
        values["no_rope_layers"] = [int(rotated) for rotated in values["no_rope_layers"]]
    if config.model_type in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        values["use_sliding_window"] = config.sliding_window is not None
    if not getattr(config, "final_norm", True) and getattr(config, "do_layer_norm_before", False):
        values["_remove_final_layer_norm"] = True
    values |= _rope(config)
    name = _ARCHITECTURES.get(config.model_type, f"{config.model_type.capitalize()}ForCausalLM")
    return {"architectures": [name], "dtype": dtype, **values}


def _rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope is None:
        return {}
    local: RopeConfig | None = getattr(config, "local_rope", None)
    parameters = _rope_values(config.rope)
    if local is not None:
        return {"rope_parameters": {FULL: parameters, SLIDING: _rope_values(local)}}
    if config.model_type == "gpt_neox":  # its spelling of the two; the defaults of absent ones would win
        return {
            "rotary_pct": parameters["partial_rotary_factor"],
            "rotary_emb_base": parameters["rope_theta"],
            "rope_parameters": parameters,
        }
    return {"rope_parameters": parameters}


def _rope_values(rope: RopeConfig) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in dataclasses.asdict(rope).items() if value is not None}
    values["rope_theta"] = values.pop("theta")
    unused = () if rope.rope_type == "yarn" else ("beta_fast", "beta_slow", "truncate")
    return {name: value for name, value in values.items() if name not in unused}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
