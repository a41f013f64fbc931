"""On several devices: the same tokens as on one, a pool that stays where it is, and little talk between devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GOLDEN_MODELS = sorted(p.parent.name for p in (REPOSITORY / "tests/goldens/models").glob("*/reference.npz"))
FUSED = ("gpt2", "phi3", "phi3_longrope")  # q, k, v (gate, up) in one matrix whose parts do not fall on devices


@pytest.fixture(scope="module")
def runs():
    """What `tensor_parallel_runs` saw. What is slow there is the compiler, and nobody waits for the code it makes."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.runtime.tensor_parallel_runs"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_same_tokens_as_on_one_device(runs, name):
    assert runs["models"][name]["tokens"] == runs["models"][name]["wanted"]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_every_device_holds_its_heads_and_keeps_them_in_place(runs, name):
    seen = runs["models"][name]
    heads, on_each_device = seen["heads"]
    assert on_each_device * seen["size"] == heads
    assert seen["stays"]
    assert seen["aliased"] >= seen["device_pool_bytes"], "the pool is donated, so outputs alias it"


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_what_a_step_communicates(runs, name):
    """Two sums a layer and one for the embedding, each of a step's activations; the logits; nothing of the pool."""
    seen = runs["models"][name]
    for step in seen["collectives"]:
        kinds = [kind for kind, _ in step]
        sums = {"olmo2": 4, "phi3": 3}.get(name, 2)  # OLMo 2's norms are over all heads of q, and of k
        assert kinds.count("all-reduce") <= sums * seen["layers"] + 1
        assert kinds.count("all-gather") == 1
        assert set(kinds) <= {"all-reduce", "all-gather"} | ({"collective-permute"} if name in FUSED else set())
        assert max(size for _, size in step) < seen["layer_elements"], "as much as a device's part of a layer's pool"


def test_parameters_are_divided(runs):
    for name, seen in runs["models"].items():
        share = seen["device_param_bytes"] / seen["param_bytes"]
        assert share < 1.5 / seen["size"], f"{name}: {share:.2f} of the parameters on each of {seen['size']}"


@pytest.mark.parametrize("pool", ["everything", "quantized"])
def test_samples_beams_copies_and_swaps_are_those_of_one_device(runs, pool):
    one, two = runs[pool]["1"], runs[pool]["2"]
    assert two == one
    assert two["swaps"] > 0
    assert two["copies"] > 0
    assert two["stays"]


def test_weights_go_straight_to_their_devices_and_are_replaced_there(runs):
    one, two = runs["weights"]["1"], runs["weights"]["2"]
    assert two["tokens"] == one["tokens"]
    assert two["tokens"][1] != two["tokens"][0]
    assert two["placed"], "what was read is what is served"
    assert two["no copy"]
    assert two["stays"]
    assert two["compiled"] == 0


def test_eight_devices_serve_a_live_tree(runs):
    assert runs["eight"]["8"] == runs["eight"]["1"]


def test_what_can_not_work_is_refused(runs):
    three, eight, sixteen = runs["refusals"]
    assert "does not divide the model's 4 attention heads" in three
    assert "use one of 1, 2, 4" in eight
    assert "JAX sees 8" in sixteen
