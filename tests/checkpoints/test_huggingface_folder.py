"""Hugging Face folders: safetensors, shards, casts, and everything that can be wrong with them."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import GOLDENS, safetensors_bytes

from checkpoints import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingWeightsError,
    UnsupportedCheckpointError,
    load,
)
from checkpoints.arrays import aligned_arrays, copy_cast
from checkpoints.safetensors_reader import SafetensorsFile

MODELS = GOLDENS / "models"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny Llama without its reference outputs."""
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(MODELS / "llama" / name, tmp_path / name)
    return tmp_path


def stored(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (tensor.dtype, tensor.shape, file.read(tensor).tobytes()) for name, tensor in file.tensors.items()}


def rewrite(folder, tensors) -> None:
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))


def edit(path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_reads_what_the_safetensors_library_reads(family):
    library = pytest.importorskip("safetensors.numpy").load_file(MODELS / family / "model.safetensors")
    checkpoint = load(MODELS / family)
    assert checkpoint.config.model_type == family
    assert checkpoint.config.sliding_window == (16 if family == "mistral" else None)
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.generation_config["do_sample"] is False
    expected = {name: value.astype(np.float32) for name, value in library.items()}
    params = checkpoint.params
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], expected["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], expected["lm_head.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], expected["model.norm.weight"])
    for layer in range(2):
        for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                ours = params[f"layers_{layer}"][block][f"{name}_proj"]["kernel"]
                np.testing.assert_array_equal(ours.T, expected[f"model.layers.{layer}.{block}.{name}_proj.weight"])
    assert len(jax.tree.leaves(params)) == len(expected)


def test_tokenizer_and_chat_template_come_along():
    tokenizer = load(MODELS / "llama").tokenizer
    text = "The quick brown fox jumps over the lazy dog."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<s>user\nhi</s>\n<s>assistant\n"
    assert load(MODELS / "llama", skip_tokenizer=True).tokenizer is None


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_every_stored_type_to_every_dtype(folder, kind, dtype):
    numpy_types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.standard_normal(shape).astype(numpy_types[kind])
        for name, (_, shape, _) in stored(folder).items()
    }
    rewrite(folder, {name: (kind, array.shape, array.tobytes()) for name, array in arrays.items()})
    params = load(folder, dtype=dtype, skip_tokenizer=True).params
    want = arrays["model.layers.1.mlp.down_proj.weight"].astype(params["norm"]["scale"].dtype)
    assert params["norm"]["scale"].dtype.name == dtype
    np.testing.assert_array_equal(params["layers_1"]["mlp"]["down_proj"]["kernel"], want.T)


def test_dtype_objects_are_understood(folder):
    for dtype in (np.float32, jax.numpy.bfloat16, np.dtype(np.float16), jax.numpy.dtype("bfloat16")):
        assert load(folder, dtype=dtype, skip_tokenizer=True).params["norm"]["scale"].dtype == np.dtype(dtype)


def test_shards_are_joined(folder):
    whole = load(folder, skip_tokenizer=True)
    tensors = list(stored(folder).items())
    weight_map = {}
    for number, part in enumerate((tensors[:7], tensors[7:]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors_bytes(dict(part)))
        weight_map |= dict.fromkeys(dict(part), name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load(folder, skip_tokenizer=True).params, whole.params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="model-00002-of-00002"):
        load(folder)


@pytest.mark.parametrize(
    "weight_map",
    [{}, [], None, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {"a": "model.bin"}],
)
def test_an_index_cannot_point_elsewhere(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpointError, match="weight_map"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    weight_map = {"a": "model.safetensors", "b": "copy.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpointError, match="another file"):
        load(folder)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder):
    tensors = stored(folder)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.2.self_attn.q_proj.weight"] = ("F32", (1,), bytes(4))
    tensors["model.layers.0.mlp.up_proj.weight"] = ("F32", (2, 3), bytes(24))
    rewrite(folder, tensors)
    with pytest.raises(MissingWeightsError) as caught:
        load(folder)
    assert set(caught.value.missing) == {"model.norm.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert caught.value.surplus == ("model.layers.2.self_attn.q_proj.weight",)
    assert caught.value.misshapen == (("model.layers.0.mlp.up_proj.weight", (128, 64), (2, 3)),)


def test_tied_embeddings_need_no_head_and_forgive_one(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    assert "lm_head" not in load(folder, skip_tokenizer=True).params
    tensors = stored(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,), bytes(32))}
    del tensors["lm_head.weight"]
    rewrite(folder, tensors)
    assert "lm_head" not in load(folder, skip_tokenizer=True).params
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(MissingWeightsError, match=r"missing: lm_head\.weight"):
        load(folder)


def test_biases_are_loaded(folder):
    edit(folder / "config.json", attention_bias=True, mlp_bias=True)
    tensors = stored(folder)
    biases = {}
    for name, (_, shape, _) in list(tensors.items()):
        if "_proj" in name:
            key = name.replace(".weight", ".bias")
            biases[key] = np.random.default_rng(len(biases)).standard_normal(shape[0]).astype(np.float32)
            tensors[key] = ("F32", (shape[0],), biases[key].tobytes())
    rewrite(folder, tensors)
    params = load(folder, skip_tokenizer=True).params
    np.testing.assert_array_equal(
        params["layers_1"]["self_attn"]["k_proj"]["bias"], biases["model.layers.1.self_attn.k_proj.bias"]
    )


def test_end_tokens_of_both_files_are_united(folder):
    edit(folder / "generation_config.json", eos_token_id=[7, 2])
    assert load(folder, skip_tokenizer=True).config.eos_token_ids == (2, 7)
    edit(folder / "generation_config.json", eos_token_id=[999999])
    with pytest.raises(CorruptCheckpointError, match="generation_config"):
        load(folder)


def test_pickles_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"neither model\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedCheckpointError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        load(folder)


@pytest.mark.parametrize("kind", ["I8", "U8", "I32", "BOOL", "F8_E4M3"])
def test_quantised_tensors_are_refused(folder, kind):
    size = {"I32": 4}.get(kind, 1)
    tensors = {name: (kind, shape, bytes(size * int(np.prod(shape)))) for name, (_, shape, _) in stored(folder).items()}
    rewrite(folder, tensors)
    with pytest.raises(UnsupportedCheckpointError, match=kind):
        load(folder)


def test_a_quantisation_config_is_refused(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedCheckpointError, match="quantised"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\xff", '{"model_type": "llama"}', "[" * 100000, '{"a": ' + "9" * 5000 + "}"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_broken_json_is_named(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    if name == "generation_config.json" and text.startswith('{"model_type'):
        assert load(folder).config.eos_token_ids == (2,)
        return
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_other_families_are_named(folder):
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(UnsupportedCheckpointError, match=r"'bert'.*llama, mistral"):
        load(folder)


def test_truncated_safetensors_are_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    for length in [*range(0, 3000, 83), *range(3000, len(data), 9973), len(data) - 1]:
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
            load(folder, skip_tokenizer=True)


def test_flipped_header_bytes_never_surprise(folder):
    data = (folder / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    generator = np.random.default_rng(0)
    for position in range(0, 8 + header_bytes, 7):
        changed = bytearray(data)
        changed[position] ^= int(generator.integers(1, 256))
        (folder / "model.safetensors").write_bytes(changed)
        try:
            load(folder, skip_tokenizer=True)
        except CheckpointError as error:
            message = str(error)
        else:
            continue
        assert str(folder) in message


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "X99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        [],
    ],
)
def test_lying_headers_are_refused(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CorruptCheckpointError):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_copy_cast_transposes_across_tiles():
    source = np.random.default_rng(0).standard_normal((600, 515), np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        target = np.empty((515, 600), dtype)
        copy_cast(source.T, target)
        np.testing.assert_array_equal(target, source.T.astype(dtype))


def test_arrays_share_one_aligned_block():
    arrays = aligned_arrays([(3,), (5, 7), (1,)], np.dtype(ml_dtypes.bfloat16))
    assert [array.shape for array in arrays] == [(3,), (5, 7), (1,)]
    starts = [array.ctypes.data for array in arrays]
    assert all(start % 64 == 0 for start in starts)
    assert starts[1] - starts[0] == 64
    assert starts[2] - starts[1] == 128
    assert aligned_arrays([], np.dtype(np.float32)) == []
