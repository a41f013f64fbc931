"""The paper's systems on a real (tiny) model, through the engine and its runner."""

import numpy as np
import pytest

from benchmarks.paper.executed import Load, compare_systems, execute, report
from benchmarks.paper.systems import SYSTEMS, Settings
from jpaged import EngineConfig
from jpaged.startup import build
from tests.engine.support import GOLDENS

CONFIG = EngineConfig(
    model=str(GOLDENS / "models" / "llama"),
    max_num_seqs=8,
    max_model_len=64,
    block_size=4,
    num_gpu_blocks_override=48,
    max_num_batched_tokens=40,
    warmup=False,
)
SETTINGS = Settings(slots=192, block_size=4, max_len=64, ft_batch=2)


@pytest.fixture(scope="module")
def parts():
    return build(CONFIG)


def load(count, **how):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 200, length).tolist() for length in rng.integers(2, 20, count)]
    return Load(prompts, rng.integers(3, 16, count).tolist(), SETTINGS, **how)


def test_all_systems_generate_the_same_tokens_and_jpaged_packs_best(parts):
    results = compare_systems(parts, CONFIG, load(16))  # raises if tokens differ
    assert set(results) == set(SYSTEMS)
    batches = {system: row["batch"] for system, row in results.items()}
    assert batches["ft"] <= 2
    assert batches["orca-max"] <= 192 // 64
    assert batches["jpaged"] >= max(batches["orca-oracle"], batches["orca-pow2"], batches["orca-max"])
    assert "Orca (Max)" in report(results, {"sharegpt beam 2": {"saved": 0.5}})


def test_sharing_is_measured_over_the_whole_run(parts):
    alone, _ = execute(parts, CONFIG, "jpaged", load(3), queued=False)
    assert alone["saved"] == 0
    beams, tokens = execute(parts, CONFIG, "jpaged", load(3, n=2, beam=True), queued=False)
    assert beams["saved"] > 0
    assert [len(outputs) for outputs in tokens] == [2, 2, 2]
