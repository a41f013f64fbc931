"""Linen parameters in Orbax directories, however they were saved; and what is refused."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_files import GOLDENS
from orbax.checkpoint import v1

from checkpoints import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingWeightsError,
    UnsupportedCheckpointError,
    load,
)

MODEL = GOLDENS / "models" / "qwen3"


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, load(MODEL, skip_tokenizer=True).params)


def with_config(folder):
    shutil.copy(MODEL / "config.json", folder / "config.json")
    return folder


def assert_same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def standard(folder, params):
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "saved", params)
    return folder / "saved"


def pytree(folder, params):
    with ocp.PyTreeCheckpointer() as saver:
        saver.save(folder / "saved", {"params": params})
    return folder / "saved"


def manager(folder, params):
    """A `TrainState`: the optimizer's moments have the same tree as the parameters."""
    wrong = jax.tree.map(jnp.zeros_like, params)
    with ocp.CheckpointManager(folder) as saver:
        for step, tree in ((7, wrong), (12, params)):
            state = {"opt_state": [{"mu": wrong, "nu": wrong}, None], "params": tree, "step": jnp.int32(step)}
            saver.save(step, args=ocp.args.StandardSave(state))
            saver.wait_until_finished()
    return folder


def item_of_a_step(folder, params):
    return manager(folder, params) / "12" / "default"


def version_1(folder, params):
    v1.save(folder / "saved", params)
    return folder / "saved"


def nnx_state(folder, params):
    v1.save(folder / "saved", {"model": jax.tree.map(lambda leaf: {"value": leaf}, params)})
    return folder / "saved"


WAYS = (standard, pytree, manager, item_of_a_step, version_1, nnx_state)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_however_it_was_saved(way, params, tmp_path):
    path = way(with_config(tmp_path), params)
    checkpoint = load(path, skip_tokenizer=True)
    assert_same(checkpoint.params, params)
    assert checkpoint.config == load(MODEL, skip_tokenizer=True).config


def test_cast_on_the_way(params, tmp_path):
    standard(with_config(tmp_path), params)
    loaded = load(tmp_path / "saved", dtype="bfloat16", skip_tokenizer=True).params
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_a_step_can_be_named(params, tmp_path):
    manager(with_config(tmp_path), params)
    assert not load(tmp_path / "7", skip_tokenizer=True).params["norm"]["scale"].any()


def test_missing_surplus_and_misshapen_leaves_are_all_listed(params, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, params)
    del broken["norm"]
    broken["layers_1"]["mlp"]["up_proj"]["bias"] = jnp.zeros(3)
    broken["layers_0"]["self_attn"]["q_norm"]["scale"] = jnp.zeros(5)
    standard(with_config(tmp_path), broken)
    with pytest.raises(MissingWeightsError) as caught:
        load(tmp_path / "saved")
    assert caught.value.missing == ("norm/scale",)
    assert caught.value.surplus == ("layers_1/mlp/up_proj/bias",)
    assert caught.value.misshapen == (("layers_0/self_attn/q_norm/scale", (32,), (5,)),)


def test_without_a_configuration(params, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        load(standard(tmp_path, params))


def test_another_tree(params, tmp_path):
    path = standard(with_config(tmp_path), {"decoder": {"weight": jnp.zeros(3)}})
    with pytest.raises(UnsupportedCheckpointError, match=r"embed_tokens/embedding.*holds decoder"):
        load(path)
    shutil.rmtree(path)
    with pytest.raises(UnsupportedCheckpointError, match="holds opt_state"):
        load(standard(tmp_path, {"opt_state": params}))


def damage(path, pattern):
    files = [file for file in path.rglob(pattern) if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return path


def test_damaged_metadata(params, tmp_path):
    with pytest.raises(CorruptCheckpointError, match="Orbax cannot read its metadata"):
        load(damage(standard(with_config(tmp_path), params), "_METADATA"))


def test_damaged_arrays(params, tmp_path):
    """In a process of its own: Orbax closes its event loop while other reads go on, which then complain to nobody."""
    paths = []
    for name, pattern in (("a", "manifest.ocdbt"), ("b", "d/*")):
        (tmp_path / name).mkdir()
        paths.append(str(damage(standard(with_config(tmp_path / name), params), pattern)))
    code = """
import sys, checkpoints
for path in sys.argv[1:]:
    try:
        checkpoints.load(path)
    except checkpoints.CorruptCheckpointError as error:
        assert path in str(error) and "Orbax cannot read it" in str(error)
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=GOLDENS.parent.parent
    )
    assert done.stdout.split() == ["refused"] * 2, done.stderr


def test_another_family(params, tmp_path):
    path = standard(tmp_path, params)
    values = json.loads((MODEL / "config.json").read_text()) | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(MissingWeightsError, match=r"surplus: .*q_norm"):
        load(path)
