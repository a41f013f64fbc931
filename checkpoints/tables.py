"""The parameter tree of every family, and what Hugging Face calls its tensors.

    embed_tokens/embedding [V, E]
    layers_{i}/...                       as each family's function below says
    norm/scale [E]                       (and bias)
    lm_head/kernel [E, V]                absent if tied to the embedding

Kernels are [in, out] here and [out, in] in files. q and k follow the half-rotation convention of RoPE.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from checkpoints.leaves import Leaf, Names, Spec, Tree, leaves
from jpaged.models.config import (
    DeepseekV3Config,
    GptOssConfig,
    ModelConfig,
    MoEConfig,
    OPTConfig,
    Qwen3MoeConfig,
)


def leaves_of(config: ModelConfig) -> Iterator[Leaf]:
    """Every parameter that a model of this configuration has, in order of use."""
    family = FAMILIES[config.model_type]
    return leaves(family.tree(config), family.names)


def ignored_names(config: ModelConfig) -> list[str]:
    """Patterns of tensors that a checkpoint may hold though the model has no place for them."""
    names = FAMILIES[config.model_type].names
    patterns = list(names.ignored)
    if config.tie_word_embeddings:
        patterns += [f"^{re.escape(name)}$" for name in names.of(("lm_head", "kernel"))]
    if isinstance(config, DeepseekV3Config):
        above = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        patterns += [rf"^model\.layers\.{index}\." for index in above]
    return patterns


def whole_names(config: ModelConfig, found: Sequence[str]) -> list[str]:
    """The names of a checkpoint's tensors, completed if the first part was left out when it was saved."""
    names = FAMILIES[config.model_type].names
    (embedding,), head = names.of(("embed_tokens", "embedding")), names.of(("lm_head", "kernel"))
    first = names.prefix[: names.prefix.index(".") + 1]
    if embedding in found or embedding.removeprefix(first) not in found:
        return list(found)
    return [name if name in head else first + name for name in found]


# ------------------------------------------------------------------------------------------------ parts of trees


def dense(fan_in: int, fan_out: int, bias: bool = False) -> Tree:
    kernel: Tree = {"kernel": Spec((fan_in, fan_out), transposed=True)}
    return kernel | ({"bias": Spec((fan_out,))} if bias else {})


def norm(width: int) -> Tree:
    return {"scale": Spec((width,))}


def layer_norm(width: int) -> Tree:
    return {"scale": Spec((width,)), "bias": Spec((width,))}


def model(
    config: ModelConfig,
    layer: Callable[[Any, int], Tree],
    final_norm: Callable[[int], Tree] | None = norm,
    embeddings: Tree | None = None,
) -> Tree:
    """A whole model. `layer` gives the tree of a layer by its index, `embeddings` replaces the token embedding."""
    hidden, vocab = config.hidden_size, config.vocab_size
    tree: Tree = embeddings or {"embed_tokens": {"embedding": Spec((vocab, hidden))}}
    tree |= {f"layers_{index}": layer(config, index) for index in range(config.num_hidden_layers)}
    if final_norm is not None:
        tree["norm"] = final_norm(hidden)
    if not config.tie_word_embeddings:
        tree["lm_head"] = dense(hidden, vocab)
    return tree


def attention(config: ModelConfig, bias: bool | None = None, output_bias: bool | None = None) -> Tree:
    """q, k, v and o; biases as the configuration says, if nothing is said here."""
    bias = config.attention_bias if bias is None else bias
    output_bias = config.attention_bias if output_bias is None else output_bias
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": dense(hidden, queries, bias),
        "k_proj": dense(hidden, keys, bias),
        "v_proj": dense(hidden, keys, bias),
        "o_proj": dense(queries, hidden, output_bias),
    }


def head_norms(config: ModelConfig) -> Tree:
    """Norms on every head of q and k."""
    return {"q_norm": norm(config.head_dim), "k_norm": norm(config.head_dim)}


def gated_mlp(config: ModelConfig, width: int | None = None) -> Tree:
    hidden, width = config.hidden_size, width or config.intermediate_size
    return {
        "gate_proj": dense(hidden, width, config.mlp_bias),
        "up_proj": dense(hidden, width, config.mlp_bias),
        "down_proj": dense(width, hidden, config.mlp_bias),
    }


def plain_mlp(config: ModelConfig, first: str, second: str) -> Tree:
    hidden, width = config.hidden_size, config.intermediate_size
    return {first: dense(hidden, width, config.mlp_bias), second: dense(width, hidden, config.mlp_bias)}


def experts(config: MoEConfig) -> Tree:
    """Gated MLPs side by side: one tensor each in files."""
    count, hidden, width = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
    inward = Spec((count, hidden, width), transposed=True, stacked=True)
    outward = Spec((count, width, hidden), transposed=True, stacked=True)
    return {"gate_proj": inward, "up_proj": inward, "down_proj": outward}


def moe(config: MoEConfig) -> Tree:
    return {"gate": dense(config.hidden_size, config.num_local_experts), "experts": experts(config)}


# ------------------------------------------------------------------------------------------------------ families


def llama_layer(config: ModelConfig, index: int) -> Tree:
    """Also Mistral and SmolLM 3."""
    return {
        "input_layernorm": norm(config.hidden_size),
        "self_attn": attention(config),
        "post_attention_layernorm": norm(config.hidden_size),
        "mlp": gated_mlp(config),
    }


def qwen2_layer(config: ModelConfig, index: int) -> Tree:
    return llama_layer(config, index) | {"self_attn": attention(config, bias=True, output_bias=False)}


def qwen3_layer(config: ModelConfig, index: int) -> Tree:
    return llama_layer(config, index) | {"self_attn": attention(config) | head_norms(config)}


def phi3_layer(config: ModelConfig, index: int) -> Tree:
    hidden, width, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return llama_layer(config, index) | {
        "self_attn": {
            "qkv_proj": dense(hidden, (heads + 2 * kv_heads) * size),
            "o_proj": dense(heads * size, hidden),
        },
        "mlp": {"gate_up_proj": dense(hidden, 2 * width), "down_proj": dense(width, hidden)},
    }


def olmo2_layer(config: ModelConfig, index: int) -> Tree:
    size = config.head_dim
    norms: Tree = {
        "q_norm": norm(config.num_attention_heads * size),
        "k_norm": norm(config.num_key_value_heads * size),
    }
    return {
        "self_attn": attention(config) | norms,
        "post_attention_layernorm": norm(config.hidden_size),
        "mlp": gated_mlp(config),
        "post_feedforward_layernorm": norm(config.hidden_size),
    }


def starcoder2_layer(config: ModelConfig, index: int) -> Tree:
    return {
        "input_layernorm": layer_norm(config.hidden_size),
        "self_attn": attention(config),
        "post_attention_layernorm": layer_norm(config.hidden_size),
        "mlp": plain_mlp(config, "c_fc", "c_proj"),
    }


def gemma2_layer(config: ModelConfig, index: int) -> Tree:
    return {
        "input_layernorm": norm(config.hidden_size),
        "self_attn": attention(config),
        "post_attention_layernorm": norm(config.hidden_size),
        "pre_feedforward_layernorm": norm(config.hidden_size),
        "mlp": gated_mlp(config),
        "post_feedforward_layernorm": norm(config.hidden_size),
    }


def gemma3_layer(config: ModelConfig, index: int) -> Tree:
    return gemma2_layer(config, index) | {"self_attn": attention(config) | head_norms(config)}


def gpt2_layer(config: ModelConfig, index: int) -> Tree:
    hidden, width = config.hidden_size, config.intermediate_size

    def conv1d(fan_in: int, fan_out: int) -> Tree:  # the one family whose files hold [in, out]
        return {"kernel": Spec((fan_in, fan_out)), "bias": Spec((fan_out,))}

    return {
        "ln_1": layer_norm(hidden),
        "attn": {"c_attn": conv1d(hidden, 3 * hidden), "c_proj": conv1d(hidden, hidden)},
        "ln_2": layer_norm(hidden),
        "mlp": {"c_fc": conv1d(hidden, width), "c_proj": conv1d(width, hidden)},
    }


def gpt2(config: ModelConfig) -> Tree:
    hidden = config.hidden_size
    embeddings: Tree = {
        "embed_tokens": {"embedding": Spec((config.vocab_size, hidden))},
        "embed_positions": {"embedding": Spec((config.max_position_embeddings, hidden))},
    }
    return model(config, gpt2_layer, layer_norm, embeddings)


def opt_layer(config: OPTConfig, index: int) -> Tree:
    self_attn = attention(config)
    self_attn["out_proj"] = self_attn.pop("o_proj")
    return {
        "self_attn": self_attn,
        "self_attn_layer_norm": layer_norm(config.hidden_size),
        **plain_mlp(config, "fc1", "fc2"),
        "final_layer_norm": layer_norm(config.hidden_size),
    }


def opt(config: OPTConfig) -> Tree:
    hidden, width = config.hidden_size, config.word_embed_proj_dim
    embeddings: Tree = {
        "embed_tokens": {"embedding": Spec((config.vocab_size, width))},
        "embed_positions": {"embedding": Spec((config.max_position_embeddings + 2, hidden))},
    }
    if config.projects_embeddings:
        embeddings |= {"project_in": dense(width, hidden), "project_out": dense(hidden, width)}
    return model(config, opt_layer, layer_norm if config.final_norm else None, embeddings)


def gpt_neox_layer(config: ModelConfig, index: int) -> Tree:
    hidden = config.hidden_size
    return {
        "input_layernorm": layer_norm(hidden),
        "attention": {
            "query_key_value": dense(hidden, 3 * hidden, config.attention_bias),
            "dense": dense(hidden, hidden, config.attention_bias),
        },
        "post_attention_layernorm": layer_norm(hidden),
        "mlp": plain_mlp(config, "dense_h_to_4h", "dense_4h_to_h"),
    }


def mixtral_layer(config: MoEConfig, index: int) -> Tree:
    return llama_layer(config, index) | {"mlp": moe(config)}


def qwen3_moe_layer(config: Qwen3MoeConfig, index: int) -> Tree:
    return qwen3_layer(config, index) | ({"mlp": moe(config)} if config.is_sparse(index) else {})


def gpt_oss_layer(config: GptOssConfig, index: int) -> Tree:
    count, hidden, width = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
    return llama_layer(config, index) | {
        "self_attn": attention(config) | {"sinks": Spec((config.num_attention_heads,))},
        "mlp": {
            "router": dense(hidden, count, bias=True),
            "experts": {  # in files as here
                "gate_up_proj": Spec((count, hidden, 2 * width)),
                "gate_up_proj_bias": Spec((count, 2 * width)),
                "down_proj": Spec((count, width, hidden)),
                "down_proj_bias": Spec((count, hidden)),
            },
        },
    }


def deepseek_v3_layer(config: DeepseekV3Config, index: int) -> Tree:
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    rank = config.kv_lora_rank
    queries: Tree = {"q_proj": dense(hidden, heads * config.head_dim)}
    if config.q_lora_rank is not None:
        queries = {
            "q_a_proj": dense(hidden, config.q_lora_rank, bias),
            "q_a_layernorm": norm(config.q_lora_rank),
            "q_b_proj": dense(config.q_lora_rank, heads * config.head_dim),
        }
    self_attn: Tree = queries | {
        "kv_a_proj_with_mqa": dense(hidden, rank + config.qk_rope_head_dim, bias),
        "kv_a_layernorm": norm(rank),
        "kv_b_proj": dense(rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": dense(heads * config.v_head_dim, hidden, bias),
    }
    tree = llama_layer(config, index) | {"self_attn": self_attn}
    if config.is_sparse(index):
        gate = dense(hidden, config.num_local_experts)
        gate["e_score_correction_bias"] = Spec((config.num_local_experts,))
        shared = gated_mlp(config, config.n_shared_experts * config.moe_intermediate_size)
        tree["mlp"] = {"gate": gate, "experts": experts(config), "shared_experts": shared}
    return tree


class Family(NamedTuple):
    """A family's tree and names."""

    tree: Callable[[Any], Tree]
    names: Names


LLAMA_NAMES = Names()
"""Ours are Llama's."""


def of_layers(
    layer: Callable[[Any, int], Tree], names: Names = LLAMA_NAMES, final_norm: Callable[[int], Tree] = norm
) -> Family:
    return Family(lambda config: model(config, layer, final_norm), names)


_GPT2_MODULES = {"embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f"}
_NEOX_MODULES = {"embed_tokens": "embed_in", "norm": "final_layer_norm", "lm_head": "embed_out"}
_MIXTRAL_MODULES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

FAMILIES: dict[str, Family] = {
    "llama": of_layers(llama_layer),
    "mistral": of_layers(llama_layer),
    "qwen2": of_layers(qwen2_layer),
    "qwen3": of_layers(qwen3_layer),
    "phi3": of_layers(phi3_layer),
    "olmo2": of_layers(olmo2_layer),
    "granite": of_layers(llama_layer),
    "smollm3": of_layers(llama_layer),
    "starcoder2": of_layers(starcoder2_layer, final_norm=layer_norm),
    "gemma2": of_layers(gemma2_layer),
    "gemma3_text": of_layers(gemma3_layer),
    "gpt2": Family(gpt2, Names("transformer.", _GPT2_MODULES, (r"\.attn\.(masked_)?bias$",))),
    "opt": Family(opt, Names("model.decoder.", {"norm": "final_layer_norm"})),
    "gpt_neox": of_layers(
        gpt_neox_layer,
        Names("gpt_neox.", _NEOX_MODULES, (r"\.rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$")),
        layer_norm,
    ),
    "mixtral": of_layers(mixtral_layer, Names(modules=_MIXTRAL_MODULES)),
    "qwen3_moe": of_layers(qwen3_moe_layer),
    "gpt_oss": of_layers(gpt_oss_layer),
    "deepseek_v3": of_layers(deepseek_v3_layer),
}
"""By `ModelConfig.model_type`."""
