"""Checkpoints of every family: what loads, and what is refused with a typed error that names the trouble."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from checkpoint_files import GOLDENS, safetensors_bytes

from checkpoints import CorruptCheckpointError, MissingWeightsError, UnsupportedCheckpointError, load, tables
from checkpoints.safetensors_reader import SafetensorsFile
from checkpoints.tables import leaves_of
from jpaged.models.config import FAMILIES, ModelConfigError, config_from_hf

MODELS = GOLDENS / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/reference.npz"))


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """A copy of a tiny model: what is wrong with it is the test's business."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(MODELS / request.param / name, tmp_path / name)
    return tmp_path


def stored(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (tensor.dtype, tensor.shape, file.read(tensor).tobytes()) for name, tensor in file.tensors.items()}


def rewrite(folder, tensors) -> None:
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_tensor_reaches_its_leaf(folder):
    """Each parameter is some tensor of the file, bit by bit, or its transpose, or a stack of them."""
    checkpoint, tensors = load(folder, skip_tokenizer=True), stored(folder)
    file = SafetensorsFile(folder / "model.safetensors")
    used = set()
    for leaf in leaves_of(checkpoint.config):
        found = [file.read(file.tensors[name]).astype(np.float32) for name in leaf.names]
        found = [array.T if leaf.spec.transposed else array for array in found]
        ours = checkpoint.params
        for key in leaf.path:
            ours = ours[key]
        np.testing.assert_array_equal(ours, np.stack(found) if leaf.spec.stacked else found[0])
        used |= set(leaf.names)
    assert used == set(tensors)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder):
    tensors = stored(folder)
    names = sorted(tensors)
    missing, misshapen = names[1], names[-1]
    del tensors[missing]
    _, shape, _ = tensors[misshapen]
    tensors[misshapen] = ("F32", (*shape, 1), bytes(4 * int(np.prod(shape))))
    tensors["something.else.weight"] = ("F32", (1,), bytes(4))
    rewrite(folder, tensors)
    with pytest.raises(MissingWeightsError) as caught:
        load(folder)
    assert caught.value.missing == (missing,)
    assert caught.value.surplus == ("something.else.weight",)
    assert caught.value.misshapen == ((misshapen, shape, (*shape, 1)),)


def test_truncated_files_are_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
            load(folder)


def test_weights_of_another_family_are_refused(folder):
    """Whatever family the configuration names instead."""
    own = json.loads((folder / "config.json").read_text())
    same_tensors = {"llama", "mistral", "granite", "smollm3"}  # these differ in what is computed, not in what is stored
    for name in NAMES:
        other = json.loads((MODELS / name / "config.json").read_text())
        if other["model_type"] == own["model_type"] or {other["model_type"], own["model_type"]} <= same_tensors:
            continue
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(MissingWeightsError):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vocab_size": 385}, MissingWeightsError),
        ({"vocab_size": "many"}, CorruptCheckpointError),
        ({"vocab_size": 2**60}, CorruptCheckpointError),
        ({"eos_token_id": 384}, CorruptCheckpointError),
        ({"model_type": "bert"}, UnsupportedCheckpointError),
        ({"model_type": None}, UnsupportedCheckpointError),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedCheckpointError),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_are_refused(folder, changes, error):
    edit(folder, **changes)
    with pytest.raises(error, match=str(folder)):
        load(folder)


def test_one_layer_more_or_less_is_noticed(folder):
    config = json.loads((folder / "config.json").read_text())
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    for difference in (-1, 1):
        changes = {key: config[key] + difference, "layer_types": None, "no_rope_layers": None}
        if difference == -1 and "num_nextn_predict_layers" in config:
            continue  # the layer above the last one is the one that predicts further tokens: ignored
        edit(folder, **changes)
        with pytest.raises(MissingWeightsError) as caught:
            load(folder)
        assert caught.value.missing if difference == 1 else caught.value.surplus


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_key_gives_a_configuration_or_a_typed_error(name):
    """Each key of config.json, and of its RoPE, set to things that it never is."""
    original = json.loads((MODELS / name / "config.json").read_text())
    refused = 0
    for key, value in itertools.product(original, STRANGE):
        refused += is_refused(original | {key: value})
    for key, value in itertools.product(original.get("rope_parameters", {}), STRANGE):
        refused += is_refused(original | {"rope_parameters": original["rope_parameters"] | {key: value}})
    assert refused > 50


STRANGE = (None, -1, 0, 1.5, "x", [], {}, [None], True, 10**30, float("nan"), float("inf"))


def is_refused(values) -> bool:
    try:
        config = config_from_hf(values)
    except ModelConfigError:
        return True
    leaves = sum(1 for _ in itertools.islice(leaves_of(config), 10000))
    assert leaves > 0
    return False


def test_checkpoints_saved_without_the_head_are_understood(folder):
    """`AutoModel.save_pretrained` leaves out the first part of the names; so do the published GPT-2 files."""
    whole, tensors = load(folder, skip_tokenizer=True), stored(folder)
    first = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(whole.config.model_type, "model.")
    rewrite(folder, {name.removeprefix(first): value for name, value in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, load(folder, skip_tokenizer=True).params, whole.params)


@pytest.mark.parametrize(
    ("name", "ignored", "surplus"),
    [
        ("deepseek_v3", "model.layers.2.eh_proj.weight", "model.layers.3.eh_proj.weight"),
        ("gpt2", "transformer.h.0.attn.bias", "transformer.h.0.mlp.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias", "gpt_neox.layers.1.mlp.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.inv_freq"),
        ("qwen2", "lm_head.weight", "model.lm_head.weight"),
    ],
)
def test_tensors_that_nobody_needs_are_ignored_and_no_others(name, ignored, surplus, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(MODELS / name / file, tmp_path / file)
    tensors = stored(tmp_path)
    rewrite(tmp_path, tensors | {ignored: ("F32", (1,), bytes(4))})
    load(tmp_path, skip_tokenizer=True)
    rewrite(tmp_path, tensors | {surplus: ("F32", (1,), bytes(4))})
    with pytest.raises(MissingWeightsError) as caught:
        load(tmp_path, skip_tokenizer=True)
    assert caught.value.surplus == (surplus,)


def test_families_are_the_same_everywhere():
    assert set(tables.FAMILIES) == set(FAMILIES)
