"""`config_from_hf`: both spellings, every kind of RoPE, and values that nobody should trust."""

import json
import math

import pytest
from checkpoint_files import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.models.config import ModelConfig, ModelConfigError, RopeConfig, UnsupportedModelError, config_from_hf

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def config(**changes) -> ModelConfig:
    return config_from_hf({key: value for key, value in (BASE | changes).items() if value != "absent"})


def test_defaults_are_hugging_faces():
    ours = config()
    assert (ours.num_key_value_heads, ours.head_dim, ours.norm_eps, ours.rope) == (
        4,
        16,
        1e-6,
        RopeConfig(),
    )
    assert (ours.tie_word_embeddings, ours.attention_bias, ours.sliding_window) == (False, False, None)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id) == (None, (), None)


def test_goldens():
    llama = config_from_hf(json.loads((GOLDENS / "models/llama/config.json").read_text()))
    assert llama.rope == RopeConfig(
        rope_type="llama3",
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    mistral = config_from_hf(json.loads((GOLDENS / "models/mistral/config.json").read_text()))
    assert (mistral.head_dim, mistral.sliding_window, mistral.rope.rope_type) == (24, 16, "default")


SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_old_and_new_spelling_agree(scaling):
    new = config(rope_parameters=scaling | {"rope_theta": 5e5})
    old = config(rope_theta=5e5, rope_scaling=scaling)
    older = config(
        rope_theta=5e5,
        rope_scaling={("type" if key == "rope_type" else key): v for key, v in scaling.items()},
    )
    assert new == old == older
    assert new.rope.rope_type == scaling["rope_type"]
    assert new.rope.theta == 5e5


def test_implied_values_of_rope():
    assert config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}).rope.original_max_position_embeddings == 256
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    assert config(rope_scaling=yarn).rope.factor == 4.0
    su = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi3 = config(rope_scaling=su, original_max_position_embeddings=32).rope
    assert (phi3.rope_type, phi3.factor, phi3.original_max_position_embeddings) == ("longrope", 8.0, 32)
    assert config(partial_rotary_factor=0.5).rope.rotary_dim(16) == 8
    assert config(rope_scaling=None, rope_theta=None).rope == RopeConfig()


def test_token_ids():
    assert config(eos_token_id=[3, 5, 3]).eos_token_ids == (3, 5)
    assert config(eos_token_id=0).eos_token_ids == (0,)
    assert config(pad_token_id=-1).pad_token_id is None
    assert config(bos_token_id=99).bos_token_id == 99


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "integer"),
        ({"hidden_size": 64.0}, "integer"),
        ({"hidden_size": True}, "integer"),
        ({"hidden_size": 0}, "must lie in"),
        ({"hidden_size": -64}, "must lie in"),
        ({"hidden_size": 10**400}, "must lie in"),
        ({"vocab_size": 2**40}, "must lie in"),
        ({"num_hidden_layers": 10**6}, "must lie in"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "finite"),
        ({"rms_norm_eps": math.inf}, "finite"),
        ({"rms_norm_eps": "1e-6"}, "number"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_parameters": [1]}, "object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor.*required"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": SCALINGS[2] | {"high_freq_factor": 1.0}}, "greater"),
        ({"rope_scaling": SCALINGS[4] | {"long_factor": [1.0]}}, "list of 8"),
        ({"rope_scaling": SCALINGS[4] | {"long_factor": [0.0] * 8}}, "long_factor"),
        ({"partial_rotary_factor": 0.01}, "even"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"eos_token_id": 100}, "vocabulary"),
        ({"eos_token_id": [1, -2]}, "vocabulary"),
        ({"eos_token_id": "2"}, "integer"),
        ({"eos_token_id": [0] * 2000}, "1024"),
        ({"bos_token_id": [[]]}, "integer"),
    ],
)
def test_bad_values_are_named(changes, pattern):
    with pytest.raises(ModelConfigError, match=pattern):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "bert"}, "'bert'.*llama, mistral"),
        ({"model_type": "absent"}, "None"),
        ({"model_type": []}, "llama"),
        ({"hidden_act": "relu6"}, "relu6.*silu"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "mrope.*yarn"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "yarn"),
    ],
)
def test_unsupported_things_are_named(changes, pattern):
    with pytest.raises(UnsupportedModelError, match=pattern):
        config(**changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(
    set(BASE)
    | {
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "eos_token_id",
    }
    | {
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "sliding_window",
        "bos_token_id",
    }
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_json_gives_a_configuration_or_a_typed_error(changes):
    try:
        ours = config_from_hf(BASE | changes)
    except ModelConfigError:
        return
    assert ours.num_attention_heads % ours.num_key_value_heads == 0
    assert ours.rope.rotary_dim(ours.head_dim) % 2 == 0
    assert math.isfinite(ours.rope.theta)
    assert ours.rope.theta > 0
