"""GGUF metadata and tensors -> configuration and parameter tree."""

import dataclasses
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

from checkpoints import CheckpointError, UnsupportedCheckpointError, gguf_architectures, load
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


PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}


def golden_as_gguf(extra: dict[str, np.ndarray] | None = None, arch: str = "llama", **changes) -> bytes:
    """A tiny model of the goldens, written the way llama.cpp's converter writes it."""
    folder = GOLDENS / "models" / ARCHITECTURES[arch]
    config = json.loads((folder / "config.json").read_text())
    file = SafetensorsFile(folder / "model.safetensors")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, ggml in (GEMMA_PARTS if arch.startswith("gemma") else PARTS).items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{ours}.{kind}"] = f"blk.{layer}.{ggml}.{kind}"
    tensors = {}
    for name, tensor in file.tensors.items():
        weights = file.read(tensor).astype(np.float32)
        if arch == "llama" and "q_proj" in name:
            weights = rows_interleaved(weights, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            weights = rows_interleaved(weights, config["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weights = weights + 1
        tensors[names[name]] = weights
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rope = config["rope_parameters"]
    metadata = {
        "general.architecture": arch,
        f"{arch}.block_count": U32(config["num_hidden_layers"]),
        f"{arch}.context_length": U32(config["max_position_embeddings"]),
        f"{arch}.embedding_length": U32(config["hidden_size"]),
        f"{arch}.feed_forward_length": U32(config["intermediate_size"]),
        f"{arch}.attention.head_count": U32(config["num_attention_heads"]),
        f"{arch}.attention.head_count_kv": U32(config["num_key_value_heads"]),
        f"{arch}.attention.key_length": U32(head_dim),
        f"{arch}.attention.value_length": U32(head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.dimension_count": U32(head_dim),
        f"{arch}.rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    return gguf_bytes(llama_metadata(**metadata | changes), f32(tensors | (extra or {})))


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_other_architectures_give_the_parameters_of_the_safetensors(arch, tmp_path):
    more = {
        f"{arch}.attention.sliding_window": U32(16),
        f"{arch}.attn_logit_softcapping": 5.0,
        f"{arch}.final_logit_softcapping": 8.0,
    }
    ours = load_bytes(
        tmp_path, golden_as_gguf(arch=arch, **(more if arch.startswith("gemma") else {})), skip_tokenizer=True
    )
    reference = load(GOLDENS / "models" / ARCHITECTURES[arch], skip_tokenizer=True)
    # A Gemma file holds its norms plus one, rounded.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), ours.params, reference.params)
    assert jax.tree.structure(ours.params) == jax.tree.structure(reference.params)
    expected = dataclasses.replace(
        reference.config,
        bos_token_id=ours.config.bos_token_id,
        pad_token_id=ours.config.pad_token_id,
        attention_bias=ours.config.attention_bias,
        layer_types=ours.config.layer_types,
        rope=ours.config.rope,
    )
    if arch == "gemma2":  # llama.cpp derives it from the width of a head
        expected = dataclasses.replace(expected, query_pre_attn_scalar=24.0)
    if arch == "gemma3":  # the caps that Gemma 3 has no more are given above all the same
        expected = dataclasses.replace(expected, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
    assert ours.config == expected


def test_the_largest_gemmas_scale_by_the_width_of_the_model():
    gemma = gguf_architectures.ARCHITECTURES
    sizes = {"embedding_length": 4608, "attention.head_count": 32, "attention.key_length": 128}
    assert gemma["gemma2"].more((sizes | {"block_count": 46}).get)["query_pre_attn_scalar"] == 144
    assert gemma["gemma2"].more((sizes | {"block_count": 42}).get)["query_pre_attn_scalar"] == 128
    assert gemma["gemma3"].more((sizes | {"block_count": 62}).get)["query_pre_attn_scalar"] == 144


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
        ({"general.architecture": "bert"}, "bert.*llama"),
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
