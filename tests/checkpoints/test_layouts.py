"""Every layout, written and read: bit by bit the same model, whatever the road."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import GOLDENS
from orbax.checkpoint import v1

import checkpoints
from checkpoints import CheckpointError, MissingWeightsError, UnsupportedCheckpointError, convert, load, save, to_linen
from checkpoints.hf_config import config_to_hf
from checkpoints.layout_tables import WRITTEN, gemma, maxtext
from checkpoints.layouts import by_key, encode, stored_shapes
from checkpoints.safetensors_reader import SafetensorsFile
from checkpoints.trees import flatten, put
from jpaged.models.config import config_from_hf

MODELS = GOLDENS / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/reference.npz"))
ROADS = {
    "llama": ("orbax", "maxtext-scanned", "maxtext", "nnx", "tunix"),
    "mistral": ("maxtext", "maxtext-scanned"),
    "mixtral": ("orbax", "maxtext-scanned", "maxtext", "nnx"),
    "qwen2": ("maxtext", "maxtext-scanned", "tunix"),
    "qwen3": ("orbax", "maxtext-scanned", "maxtext", "nnx", "tunix"),
    "qwen3_moe": ("orbax", "nnx"),
    "gemma2": ("orbax", "maxtext-scanned", "maxtext", "nnx", "gemma", "tunix"),
    "gemma3_text": ("maxtext", "maxtext-scanned", "gemma", "tunix"),
}


def tensors(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        found |= {name: (t.dtype, t.shape, file.read(t).tobytes()) for name, t in file.tensors.items()}
    return found


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("name", ROADS)
def test_a_round_trip_through_all_layouts_ends_where_it_began(name, tmp_path):
    """Key by key, shape by shape and bit by bit the original Hugging Face folder."""
    source = MODELS / name
    for step, format in enumerate((*ROADS[name], "safetensors")):
        convert(source, tmp_path / str(step), format=format)
        source = tmp_path / str(step)
    assert tensors(source) == tensors(MODELS / name)
    for file in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (source, MODELS / name))
        assert ours == (theirs | {"dtype": "bfloat16"} if file == "config.json" else theirs)  # what the tensors are


@pytest.mark.parametrize(
    ("format", "item"), [("maxtext", "items"), ("tunix", "model_params"), ("gemma", "default"), ("orbax", "state")]
)
def test_checkpointables_have_the_names_that_their_projects_ask_for(format, item, tmp_path):
    convert(MODELS / "gemma2", tmp_path / "x", format=format)
    assert [child.name for child in (tmp_path / "x").iterdir() if (child / "_METADATA").is_file()] == [item]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_survives_too(name, tmp_path):
    convert(MODELS / name, tmp_path / "a", format="safetensors", dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "b", format="maxtext-scanned")
    convert(tmp_path / "b", tmp_path / "c", format="safetensors")
    assert tensors(tmp_path / "c") == tensors(tmp_path / "a")
    assert {kind for kind, _, _ in tensors(tmp_path / "c").values()} == {"BF16"}


@pytest.mark.parametrize("name", NAMES)
def test_folders_and_configurations_of_all_families_are_written(name, tmp_path):
    """From a `ModelConfig` alone, in several files; and what is written is what was read."""
    original = load(MODELS / name, dtype="auto", skip_tokenizer=True)
    assert config_from_hf(config_to_hf(original.config, "float32")) == original.config
    save(tmp_path / "x", original.config, original.params, format="safetensors", max_shard_bytes=50_000)
    assert tensors(tmp_path / "x") == tensors(MODELS / name)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(MODELS / name))
    again = load(tmp_path / "x", dtype="auto", skip_tokenizer=True)
    assert again.config == original.config
    assert_same(again.params, original.params)


def test_maxtext_holds_what_maxtext_expects(tmp_path):
    """Numbers worked out here, from the description of the format and not from our tables."""
    convert(MODELS / "llama", tmp_path / "llama", format="maxtext-scanned")
    decoder = v1.load(tmp_path / "llama")["params"]["params"]["decoder"]
    ours = load(MODELS / "llama", skip_tokenizer=True).params["layers_1"]["self_attn"]
    query = ours["q_proj"]["kernel"].reshape(64, 4, 16) / 4  # head_dim 16
    stored = np.asarray(decoder["layers"]["self_attention"]["query"]["kernel"])[:, 1]  # layer axis 1
    np.testing.assert_array_equal(stored[..., ::2], query[..., :8])  # llama3's RoPE turns neighbours
    np.testing.assert_array_equal(stored[..., 1::2], query[..., 8:])
    assert decoder["logits_dense"]["kernel"].shape == (64, 384)
    convert(MODELS / "gemma2", tmp_path / "gemma2", format="maxtext")
    tree, ours = v1.load(tmp_path / "gemma2")["params"]["params"], load(MODELS / "gemma2", skip_tokenizer=True).params
    np.testing.assert_array_equal(tree["token_embedder"]["embedding"], ours["embed_tokens"]["embedding"] * 8)
    np.testing.assert_allclose(
        tree["decoder"]["layers_0"]["pre_ffw_norm_global"]["scale"],
        1 + ours["layers_1"]["pre_feedforward_layernorm"]["scale"],
    )
    convert(MODELS / "mixtral", tmp_path / "mixtral", format="maxtext-scanned")
    experts = v1.load(tmp_path / "mixtral")["params"]["params"]["decoder"]["layers"]["MoeBlock_0"]["wi_0"]
    assert experts.shape == (4, 2, 64, 48)  # experts, layers, in, out


def test_padded_vocabularies_are_cut(tmp_path):
    original = load(MODELS / "gemma2", skip_tokenizer=True)
    convert(MODELS / "gemma2", tmp_path / "a", format="maxtext")
    tree = v1.load(tmp_path / "a")
    embedder = tree["params"]["params"]["token_embedder"]
    embedder["embedding"] = np.pad(np.asarray(embedder["embedding"]), ((0, 128), (0, 0)))
    v1.save(tmp_path / "b", tree)
    shutil.copy(MODELS / "gemma2" / "config.json", tmp_path / "b")
    assert_same(load(tmp_path / "b", skip_tokenizer=True).params, original.params)


def wrapped(way, tree):
    valued = jax.tree.map(lambda leaf: {"value": leaf}, tree)
    return {
        "full": {"params": {"params": tree}, "opt_state": {"mu": {"params": tree}}, "step": np.array(3)},
        "params": {"params": {"params": tree}},
        "sft": valued,
        "rl": {"base": valued},
    }[way]


@pytest.mark.parametrize("way", ["full", "params", "sft", "rl"])
def test_maxtext_trees_are_found_however_they_are_wrapped(way, tmp_path):
    convert(MODELS / "qwen3", tmp_path / "a", format="maxtext-scanned")
    tree = v1.load(tmp_path / "a")["params"]["params"]
    v1.save(tmp_path / "b", wrapped(way, tree))
    shutil.copy(MODELS / "qwen3" / "config.json", tmp_path / "b")
    assert_same(load(tmp_path / "b", skip_tokenizer=True).params, load(MODELS / "qwen3", skip_tokenizer=True).params)


def test_tunix_checkpointables(tmp_path):
    convert(MODELS / "llama", tmp_path / "a", format="tunix")
    tree = v1.load(tmp_path / "a")
    v1.save_checkpointables(tmp_path / "7", {"model_params": tree, "optimizer_state": {"mu": tree}})
    shutil.copy(MODELS / "llama" / "config.json", tmp_path)
    assert_same(load(tmp_path, skip_tokenizer=True).params, load(MODELS / "llama", skip_tokenizer=True).params)


@pytest.mark.parametrize("way", ["flat", "kauldron", "stacked", "transposed"])
def test_deepmind_gemma_in_all_its_forms(way, tmp_path):
    convert(MODELS / "gemma3_text", tmp_path / "a", format="gemma")
    tree = v1.load(tmp_path / "a")
    if way == "transposed":
        for layer in range(3):
            mlp = tree[f"layer_{layer}"]["mlp"]
            mlp["gating_einsum"] = np.asarray(mlp["gating_einsum"]).swapaxes(1, 2)
    elif way == "kauldron":
        tree = {"params": tree, "opt_state": [tree], "step": np.array(1)}
    else:
        flat = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            *keys, last = [key.key for key in path]
            if last in ("gating_einsum", "linear"):
                keys, last = [*keys, last], "w"
            flat.setdefault("/".join(["transformer", *keys]), {})[last] = np.asarray(leaf)
        tree = flat
    if way == "stacked":  # three layers, a pattern of three
        tree = {
            key.replace("layer_", "stacked_layers/attention_type_"): jax.tree.map(
                lambda leaf, stack="layer_" in key: leaf[None] if stack else leaf, value
            )
            for key, value in tree.items()
        }
    v1.save(tmp_path / "b", tree)
    shutil.copy(MODELS / "gemma3_text" / "config.json", tmp_path / "b")
    ours = load(MODELS / "gemma3_text", skip_tokenizer=True).params
    assert_same(load(tmp_path / "b", skip_tokenizer=True).params, ours)


@pytest.mark.parametrize("format", [f for f in checkpoints.FORMATS if f not in ("safetensors", "orbax", "nnx")])
def test_families_without_a_table_are_refused(format, tmp_path):
    with pytest.raises(UnsupportedCheckpointError, match=r"of phi3 are not supported; supported: .*gemma2"):
        convert(MODELS / "phi3", tmp_path / "x", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_missing_surplus_and_misshapen_arrays_are_listed_in_every_format(format, tmp_path):
    convert(MODELS / "gemma2", tmp_path / "a", format=format)
    other = load(MODELS / "gemma2", skip_tokenizer=True)
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    changes = {"num_hidden_layers": 2, "layer_types": values["layer_types"][:2], "intermediate_size": 96}
    (tmp_path / "a" / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(MissingWeightsError) as caught:
        load(tmp_path / "a", skip_tokenizer=True)
    assert caught.value.misshapen
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(values | {"num_hidden_layers": 4, "layer_types": values["layer_types"] + ["full_attention"]})
    )
    with pytest.raises(MissingWeightsError) as caught:
        load(tmp_path / "a", skip_tokenizer=True)
    assert caught.value.missing or caught.value.misshapen
    (tmp_path / "a" / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    with pytest.raises(CheckpointError):
        load(tmp_path / "a", skip_tokenizer=True)
    assert other.config.num_hidden_layers == 3


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_truncated_files_are_refused_in_every_format(format, tmp_path):
    convert(MODELS / "gemma2", tmp_path / "a", format=format)
    for file in [*(tmp_path / "a").rglob("_METADATA"), *(tmp_path / "a").glob("*.safetensors")]:
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(checkpoints.CorruptCheckpointError):
        load(tmp_path / "a", skip_tokenizer=True)


def test_nothing_is_overwritten_unless_told_and_nothing_half_done_stays(tmp_path):
    convert(MODELS / "llama", tmp_path / "x", format="orbax")
    with pytest.raises(CheckpointError, match="exists"):
        convert(MODELS / "llama", tmp_path / "x", format="safetensors")
    with pytest.raises(UnsupportedCheckpointError):
        convert(MODELS / "mixtral", tmp_path / "x", format="tunix", overwrite=True)
    load(tmp_path / "x")
    done = convert(MODELS / "llama", tmp_path / "x", format="safetensors", overwrite=True)
    assert "tokenizer.json" in done.files
    assert load(tmp_path / "x").tokenizer.encode("hi") == load(MODELS / "llama").tokenizer.encode("hi")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_tree_that_is_not_the_models_is_not_saved(tmp_path):
    original = load(MODELS / "llama", skip_tokenizer=True)
    with pytest.raises(MissingWeightsError, match="missing: norm/scale"):
        save(tmp_path / "x", original.config, {k: v for k, v in original.params.items() if k != "norm"})
    with pytest.raises(CheckpointError, match="format 'pickle' is not one of safetensors"):
        save(tmp_path / "x", original.config, original.params, format="pickle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scaled_queries_of_any_head_size_come_back(head_dim, dtype):
    values = json.loads((MODELS / "gemma2" / "config.json").read_text()) | {"head_dim": head_dim}
    config = config_from_hf(values)
    links = {link.path: link for link in maxtext(config, scanned=False)}
    link = links["layers_0", "self_attn", "q_proj", "kernel"]
    ours = np.random.default_rng(0).standard_normal(link.shape, np.float32).astype(dtype)
    theirs = np.zeros(link.part_shape, link.value.stored(ours.dtype))
    link.encode(ours, theirs)
    back = np.zeros_like(ours)
    link.decode(theirs, back, ours.dtype)
    assert back.tobytes() == ours.tobytes()
    assert gemma(config, transposed=False)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("llama", "tunix"),
        ("llama", "orbax"),
        ("gemma2", "gemma"),
        ("gemma3_text", "tunix"),
        ("qwen3", "maxtext-scanned"),
    ],
)
def test_trees_in_memory_become_ours(family, format):
    checkpoint = load(MODELS / family, skip_tokenizer=True)
    flat = dict(flatten(checkpoint.params))
    wrapped, table, _ = WRITTEN[format]
    layout, theirs = table(checkpoint.config), {}
    shapes = stored_shapes(layout)
    for key, links in by_key(layout).items():
        put(theirs, (*wrapped, *key), jnp.array(encode(links, shapes[key], flat.__getitem__)))
    ours = dict(flatten(to_linen(checkpoint.config, theirs)))
    assert set(ours) == set(flat)
    for path, leaf in flat.items():
        np.testing.assert_array_equal(np.asarray(ours[path], leaf.dtype), leaf, err_msg=str(path))
    kept = [path for path in ours if any(ours[path] is leaf for _, leaf in flatten(theirs))]
    assert ("norm", "scale") in kept or format == "maxtext-scanned", "what needs no change is passed on as it is"
    lost = next(iter(shapes))
    node = theirs
    for key in (*wrapped, *lost[:-1]):
        node = node[key]
    del node[lost[-1]]
    with pytest.raises((MissingWeightsError, UnsupportedCheckpointError)):
        to_linen(checkpoint.config, theirs)
