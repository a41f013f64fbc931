"""GGUF metadata and tensors -> configuration and parameter tree."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    BF16,
    F16,
    F32,
    GOLDENS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    U32,
    f32,
    gguf_bytes,
    llama_metadata,
    llama_shapes,
    random_blocks,
    random_tensors,
)

from checkpoints import CheckpointError, UnsupportedCheckpointError, load
from checkpoints.gguf_quants import GGML_TYPES
from checkpoints.safetensors_reader import SafetensorsFile
from jpaged.models.config import RopeConfig


def load_bytes(tmp_path, data: bytes, **options):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return load(path, **options)


def rows_interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: first and second half of every head, alternately."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weights.shape)


def golden_as_gguf(extra: dict[str, np.ndarray] | None = None) -> bytes:
    """The tiny Llama of the goldens, written the way llama.cpp's converter writes it."""
    folder = GOLDENS / "models" / "llama"
    config = json.loads((folder / "config.json").read_text())
    file = SafetensorsFile(folder / "model.safetensors")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, ggml in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{ggml}.weight"
    tensors = {}
    for name, tensor in file.tensors.items():
        weights = file.read(tensor).astype(np.float32)
        if "q_proj" in name:
            weights = rows_interleaved(weights, config["num_attention_heads"])
        if "k_proj" in name:
            weights = rows_interleaved(weights, config["num_key_value_heads"])
        tensors[names[name]] = weights
    metadata = llama_metadata(
        **{
            "llama.block_count": U32(config["num_hidden_layers"]),
            "llama.context_length": U32(config["max_position_embeddings"]),
            "llama.embedding_length": U32(config["hidden_size"]),
            "llama.feed_forward_length": U32(config["intermediate_size"]),
            "llama.attention.head_count": U32(config["num_attention_heads"]),
            "llama.attention.head_count_kv": U32(config["num_key_value_heads"]),
            "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
            "llama.rope.dimension_count": U32(config["head_dim"]),
        }
    )
    return gguf_bytes(metadata, f32(tensors | (extra or {})))


def test_same_parameters_and_shape_as_the_safetensors_of_the_same_model(tmp_path):
    ours = load_bytes(tmp_path, golden_as_gguf(), skip_tokenizer=True)
    reference = load(GOLDENS / "models" / "llama", skip_tokenizer=True)
    jax.tree.map(np.testing.assert_array_equal, ours.params, reference.params)
    assert jax.tree.structure(ours.params) == jax.tree.structure(reference.params)
    for field in (
        "vocab_size",
        "hidden_size",
        "head_dim",
        "norm_eps",
        "tie_word_embeddings",
        "eos_token_ids",
    ):
        assert getattr(ours.config, field) == getattr(reference.config, field)
    assert ours.config.rope.theta == reference.config.rope.theta


def test_plain_vectors_and_biases_of_q_and_k_are_permuted_too(tmp_path):
    shapes = llama_shapes() | {
        f"blk.0.attn_{n}.bias": (s,) for n, s in (("q", 32), ("k", 16), ("v", 16), ("output", 32))
    }
    tensors = random_tensors(shapes)
    params = load_bytes(tmp_path, gguf_bytes(llama_metadata(), f32(tensors)), skip_tokenizer=True).params
    attention = params["layers_0"]["self_attn"]
    for name, ggml, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        np.testing.assert_array_equal(rows_interleaved(attention[name]["bias"], heads), tensors[f"blk.0.{ggml}.bias"])
        np.testing.assert_array_equal(
            rows_interleaved(attention[name]["kernel"].T, heads), tensors[f"blk.0.{ggml}.weight"]
        )
    np.testing.assert_array_equal(attention["v_proj"]["bias"], tensors["blk.0.attn_v.bias"])


QUANTISED = {
    Q4_0: [0],
    Q4_1: [0, 2],
    Q5_0: [0],
    Q5_1: [0, 2],
    Q8_0: [0],
    Q4_K: [0, 2],
    Q5_K: [0, 2],
    Q6_K: [208],
}


@pytest.mark.parametrize("kind", [*QUANTISED, F16, BF16], ids=lambda kind: GGML_TYPES[kind].name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_type_lands_in_our_layout(tmp_path, kind, dtype):
    """A model 256 wide whose matrices all have one type, against rows dequantised one tensor at a time."""
    ggml_type = GGML_TYPES[kind]
    shapes = llama_shapes(vocab=16, hidden=256, width=512, queries=256, keys=128)
    tensors, expected = {}, {}
    for index, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            tensors[name] = (F32, shape, np.ones(shape, np.float32).tobytes())
        elif ggml_type.dtype is not None:
            expected[name] = np.random.default_rng(index).standard_normal(shape).astype(ggml_type.dtype)
            tensors[name] = (kind, shape, expected[name].tobytes())
        else:
            blocks = shape[1] // ggml_type.block_size
            raw = random_blocks(shape[0], blocks, ggml_type.type_size, QUANTISED[kind], seed=index)
            tensors[name] = (kind, shape, raw.tobytes())
            expected[name] = np.empty(shape, np.float32)
            packed = raw.reshape(shape[0], blocks, ggml_type.type_size).transpose(1, 2, 0)
            ggml_type.dequantize(packed, expected[name].reshape(shape[0], blocks, -1).transpose(1, 2, 0))
    metadata = llama_metadata(
        **{
            "llama.embedding_length": U32(256),
            "llama.feed_forward_length": U32(512),
            "llama.rope.dimension_count": U32(64),
        }
    )
    params = load_bytes(tmp_path, gguf_bytes(metadata, tensors), dtype=dtype, skip_tokenizer=True).params
    want = {
        name: value.astype(np.float32).astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else value
        for name, value in expected.items()
    }
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], want["token_embd.weight"])
    layer = params["layers_0"]
    np.testing.assert_array_equal(layer["mlp"]["down_proj"]["kernel"].T, want["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(layer["mlp"]["up_proj"]["kernel"].T, want["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(layer["self_attn"]["v_proj"]["kernel"].T, want["blk.0.attn_v.weight"])
    restored = rows_interleaved(np.ascontiguousarray(layer["self_attn"]["q_proj"]["kernel"].T), 4)
    np.testing.assert_array_equal(restored, want["blk.0.attn_q.weight"])


def test_leaves_are_contiguous_aligned_and_taken_by_jax_without_a_copy(tmp_path):
    for dtype in ("float32", "bfloat16"):
        params = load_bytes(tmp_path, golden_as_gguf(), dtype=dtype, skip_tokenizer=True).params
        for leaf in jax.tree.leaves(params):
            assert leaf.flags.c_contiguous
            assert not leaf.flags.writeable
            assert leaf.ctypes.data % 64 == 0
            on_device = jax.device_put(leaf, jax.devices("cpu")[0])
            assert on_device.unsafe_buffer_pointer() == leaf.ctypes.data


def rope_of(tmp_path, extra: dict[str, np.ndarray] | None = None, **changes) -> RopeConfig:
    data = gguf_bytes(llama_metadata(**changes), f32(random_tensors(llama_shapes()) | (extra or {})))
    return load_bytes(tmp_path, data, skip_tokenizer=True).config.rope


def test_rope_scaling_metadata(tmp_path):
    assert rope_of(tmp_path) == RopeConfig(theta=10000.0)
    assert rope_of(tmp_path, **{"llama.rope.scaling.type": "none"}) == RopeConfig(theta=10000.0)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope_of(tmp_path, **linear) == RopeConfig(rope_type="linear", factor=4.0)
    assert rope_of(tmp_path, **{"llama.rope.scale_linear": 2.0}) == RopeConfig(rope_type="linear", factor=2.0)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": U32(16),
    }
    assert rope_of(tmp_path, **yarn) == RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    scaled = rope_of(tmp_path, **yarn, **{"llama.rope.scaling.attn_factor": 0.5})
    assert scaled.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    with pytest.raises(UnsupportedCheckpointError, match="longrope"):
        rope_of(tmp_path, **{"llama.rope.scaling.type": "longrope"})


def llama3_divisors(theta: float, factor: float, original: int, pairs: int) -> np.ndarray:
    """What llama.cpp's converter writes to rope_freqs.weight, by the formula of Llama 3.1."""
    divisors = []
    for i in range(pairs):
        wavelength = 2 * math.pi * theta ** (i / pairs)
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_rope_freqs_are_llama_3_scaling(tmp_path):
    base = {"llama.rope.freq_base": 500000.0}
    divisors = llama3_divisors(500000.0, 8.0, 8192, pairs=4)
    assert rope_of(tmp_path, {"rope_freqs.weight": divisors}, **base) == RopeConfig(
        rope_type="llama3",
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    unusual = llama3_divisors(500000.0, 8.0, 32, pairs=4)
    rope = rope_of(tmp_path, {"rope_freqs.weight": unusual}, **base)
    assert (rope.rope_type, rope.attention_factor) == ("longrope", 1.0)
    np.testing.assert_allclose(rope.short_factor, unusual)
    assert rope.short_factor == rope.long_factor
    with pytest.raises(CheckpointError):  # a divisor too many
        rope_of(tmp_path, {"rope_freqs.weight": llama3_divisors(10000.0, 8.0, 32, pairs=5)})


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"general.architecture": "gemma3"}, "gemma3.*llama"),
        ({"general.architecture": None}, "architecture None"),
        ({"llama.expert_count": U32(8)}, "mixture"),
        ({"llama.attention.head_count_kv": U32(3)}, "multiple"),
        ({"llama.attention.head_count": [4, 4]}, "list"),
        ({"llama.block_count": None}, "num_hidden_layers"),
        ({"llama.context_length": U32(0)}, "max_position_embeddings"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps"),
        ({"llama.rope.dimension_count": U32(4)}, "rotated"),
        ({"llama.attention.value_length": U32(4)}, "widths"),
        ({"tokenizer.ggml.eos_token_id": U32(99)}, "eos_token_id = 99"),
    ],
)
def test_bad_metadata_is_named(tmp_path, changes, pattern):
    data = gguf_bytes(llama_metadata(**changes), f32(random_tensors(llama_shapes())))
    with pytest.raises(CheckpointError, match=pattern):
        load_bytes(tmp_path, data, skip_tokenizer=True)


def test_a_quantised_vector_is_refused(tmp_path):
    tensors = f32(random_tensors(llama_shapes()))
    tensors["output_norm.weight"] = (Q8_0, (32,), bytes(34))
    with pytest.raises(UnsupportedCheckpointError, match="quantised vector"):
        load_bytes(tmp_path, gguf_bytes(llama_metadata(), tensors), skip_tokenizer=True)


def test_end_of_turn_tokens_end_a_generation(tmp_path):
    data = gguf_bytes(llama_metadata(**{"tokenizer.ggml.eot_token_id": U32(5)}), f32(random_tensors(llama_shapes())))
    checkpoint = load_bytes(tmp_path, data, skip_tokenizer=True)
    assert checkpoint.config.eos_token_ids == (2, 5)
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": None}
