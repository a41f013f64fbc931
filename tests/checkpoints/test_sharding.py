"""Parameters placed where `checkpoints.load(sharding=...)` says, whatever they are read from."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoint_files import GOLDENS, tiny_llama
from jax.sharding import SingleDeviceSharding

from checkpoints import CheckpointError, load

ROOT = GOLDENS.parent.parent

ON_EIGHT = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
import checkpoints

*models, folder = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

def sharding_of(path, shape):
    if path[-1] == "scale":
        return None if path[0] == "norm" else NamedSharding(mesh, PartitionSpec())
    last = ["a" if shape[0] % 2 == 0 else None, *[None] * (len(shape) - 2), "b"][-len(shape):]
    return NamedSharding(mesh, PartitionSpec(*last))

def check(model):
    plain = checkpoints.load(model, skip_tokenizer=True).params
    done = []
    loaded = checkpoints.load(
        model, skip_tokenizer=True, sharding=sharding_of, progress=lambda now, total, what: done.append((now, total))
    ).params
    assert done[-1][0] == done[-1][1], done[-1]
    for (keys, whole), leaf in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(loaded), strict=True):
        path = tuple(key.key for key in keys)
        wanted = sharding_of(path, whole.shape)
        if wanted is not None:
            assert leaf.sharding == wanted, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole), err_msg=str(path))
    return plain

for model in models:
    params = check(model)
v1.save(folder + "/orbax", jax.tree.map(jax.numpy.asarray, params))
check(folder + "/orbax")
print("same")
"""


def test_shards_hold_what_an_unsharded_load_holds(tmp_path):
    """On eight simulated devices: GGUF (a shard's edge inside a packed block), stacked experts, Orbax."""
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    models = [str(tmp_path / "tiny.gguf"), *(str(GOLDENS / "models" / name) for name in ("gpt_oss", "mixtral"))]
    shutil.copy(GOLDENS / "models" / "mixtral" / "config.json", tmp_path)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, *models, str(tmp_path)], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "same\n", done.stderr


def test_a_tree_of_shardings_may_stop_above_the_leaves():
    device = SingleDeviceSharding(jax.devices()[0])
    everything = load(
        GOLDENS / "models" / "llama",
        skip_tokenizer=True,
        sharding={
            "embed_tokens": device,
            "layers_0": {"self_attn": device, "mlp": None, "input_layernorm": None, "post_attention_layernorm": None},
            "layers_1": None,
            "norm": {"scale": device},
            "lm_head": None,
        },
    ).params
    assert isinstance(everything["embed_tokens"]["embedding"], jax.Array)
    assert isinstance(everything["layers_0"]["self_attn"]["q_proj"]["kernel"], jax.Array)
    assert isinstance(everything["layers_0"]["mlp"]["up_proj"]["kernel"], np.ndarray)
    with pytest.raises(CheckpointError, match="sharding says nothing of embed_tokens/embedding"):
        load(GOLDENS / "models" / "llama", skip_tokenizer=True, sharding={"norm": device})
