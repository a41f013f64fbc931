"""Configurations of the families: old spellings, keys that are left out, and what follows from them."""

import dataclasses
import json

import pytest
from checkpoint_files import GOLDENS

from jpaged.models.config import FULL, SLIDING, ModelConfigError, RopeConfig, UnsupportedModelError, config_from_hf

MODELS = GOLDENS / "models"


def raw(name: str) -> dict:
    return json.loads((MODELS / name / "config.json").read_text())


def changed(name: str, absent: tuple[str, ...] = (), **changes):
    values = {key: value for key, value in raw(name).items() if key not in absent}
    return config_from_hf(values | changes)


def windows(config) -> list[int | None]:
    return [config.layer(index).sliding_window for index in range(config.num_hidden_layers)]


OLD_SPELLINGS = [
    ("llama", {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in raw("llama")["rope_parameters"].items() if k != "rope_theta"}}),
    ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    ("gpt_oss", {"rope_theta": 150000, "rope_scaling": {k: v for k, v in raw("gpt_oss")["rope_parameters"].items() if k != "rope_theta"}}),
    ("phi3_longrope", {"rope_theta": 10000.0, "rope_scaling": {"type": "su", **{k: raw("phi3_longrope")["rope_parameters"][k] for k in ("long_factor", "short_factor")}}}),
    ("deepseek_v3", {"rope_theta": 10000, "rope_scaling": {"type": "yarn", **{k: v for k, v in raw("deepseek_v3")["rope_parameters"].items() if k not in ("rope_theta", "rope_type")}}}),
    ("mixtral", {"rope_theta": 1e6}),
    ("qwen2", {"rope_theta": 1000000.0, "rope_scaling": None}),
    ("starcoder2", {"rope_theta": 100000.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old"), OLD_SPELLINGS, ids=[name for name, _ in OLD_SPELLINGS])
def test_old_and_new_spelling_of_rope_agree(name, old):
    assert changed(name, absent=("rope_parameters",), **old) == changed(name)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("qwen3_moe", "num_local_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "num_local_experts"),
        ("gemma2", "hidden_activation", "hidden_act"),
        ("gpt2", "n_embd", "hidden_size"),
        ("opt", "ffn_dim", "intermediate_size"),
        ("starcoder2", "norm_epsilon", "rms_norm_eps"),
    ],
)
def test_either_name_of_a_key(name, ours, theirs):
    assert changed(name, absent=(ours,), **{theirs: raw(name)[ours]}) == changed(name)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 50.0),
        ("gemma2", "final_logit_softcapping", 30.0),
        ("gemma3_text", "final_logit_softcapping", None),
        ("gemma2", "tie_word_embeddings", True),
        ("smollm3", "tie_word_embeddings", True),
        ("gpt2", "tie_word_embeddings", True),
        ("mistral", "sliding_window", 4096),
        ("phi3", "sliding_window", None),
        ("gpt_oss", "sliding_window", 128),
        ("qwen3_moe", "norm_topk_prob", False),
        ("opt", "do_layer_norm_before", True),
        ("gpt_neox", "use_parallel_residual", True),
        ("granite", "residual_multiplier", 1.0),
        ("gemma2", "head_dim", 256),
    ],
)
def test_absent_keys_take_hugging_faces_defaults(name, key, value):
    assert getattr(changed(name, absent=(key,)), key) == value


def test_norm_epsilons_of_absent_keys():
    expected = {"llama": 1e-6, "qwen3": 1e-6, "olmo2": 1e-5, "phi3": 1e-5, "mixtral": 1e-5, "gpt_oss": 1e-5}
    assert {name: changed(name, absent=("rms_norm_eps",)).norm_eps for name in expected} == expected
    assert changed("gpt2", absent=("layer_norm_epsilon",)).norm_eps == 1e-5
    assert changed("gpt_neox", layer_norm_eps=1e-7).norm_eps == 1e-7


def test_which_layers_have_a_window():
    assert windows(changed("mistral")) == [16, 16]
    assert windows(changed("gemma2", absent=("layer_types",))) == [16, None, 16]
    assert windows(changed("gemma3_text", absent=("layer_types", "_sliding_window_pattern"), num_hidden_layers=7)) == [
        *[16] * 5,
        None,
        16,
    ]
    assert windows(changed("gemma3_text", absent=("layer_types",), sliding_window_pattern=2)) == [16, None, 16]
    assert windows(changed("gpt_oss", absent=("layer_types",))) == [16, None]
    qwen = {"sliding_window": 8, "max_window_layers": 1}
    assert windows(changed("qwen2", absent=("layer_types",), use_sliding_window=True, **qwen)) == [None, 8]
    assert windows(changed("qwen2", absent=("layer_types",), use_sliding_window=False, **qwen)) == [None, None]
    assert windows(changed("qwen3_moe", use_sliding_window=True, sliding_window=8)) == [8, 8, 8]
    assert windows(changed("qwen2", layer_types=[SLIDING, FULL], use_sliding_window=True, sliding_window=8)) == [
        8,
        None,
    ]


def test_which_layers_are_rotated_and_how():
    smollm3 = changed("smollm3")
    assert [smollm3.layer(index).rope is not None for index in range(4)] == [True, True, True, False]
    assert changed("smollm3", no_rope_layers=None, no_rope_layer_interval=2).rotated_layers == (True, False) * 2
    gemma = changed("gemma3_text")
    assert gemma.layer(0).rope == RopeConfig(theta=10000.0)
    assert gemma.layer(2).rope == RopeConfig(rope_type="linear", theta=1e6, factor=8.0)
    assert changed("gpt2").layer(0).rope is None


def test_which_layers_have_experts():
    assert [changed("qwen3_moe").is_sparse(index) for index in range(3)] == [True, False, True]
    assert [changed("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2).is_sparse(i) for i in range(3)] == [
        False,
        True,
        False,
    ]
    assert [changed("deepseek_v3").is_sparse(index) for index in range(2)] == [False, True]


def test_longrope_takes_the_short_factors_if_texts_stay_short():
    config = changed("phi3_longrope")
    assert config.for_length(7) is config
    short = config.for_length(6)
    assert short.rope.long_factor == config.rope.short_factor
    assert dataclasses.replace(short, rope=config.rope) == config
    assert changed("llama").for_length(6) == changed("llama")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}),
    ],
)
def test_options_that_are_not_implemented_are_refused(name, changes):
    with pytest.raises(UnsupportedModelError, match=next(iter(changes))):
        changed(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        ("mixtral", {"num_local_experts": 4096, "num_hidden_layers": 4096}, "experts in all"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"n_group": 8}, "at least 2"),
        ("deepseek_v3", {"topk_group": 1}, "fewer than 3 experts"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "even"),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_theta": 1e6}}}, SLIDING),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        ("qwen3_moe", {"mlp_only_layers": [[1]]}, "mlp_only_layers"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types"),
        ("gpt2", {"n_embd": 65}, "multiple"),
    ],
)
def test_values_that_contradict_each_other_are_refused(name, changes, pattern):
    with pytest.raises(ModelConfigError, match=pattern):
        changed(name, **changes)
