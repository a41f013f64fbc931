"""The device's side of the bargain: memory is updated in place, shapes are few, a second start compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints
from jpaged import SamplingParams
from jpaged.scheduling.plan import make_buckets
from jpaged.startup import Limits, default_tile_size, resolve_limits
from tests.engine.support import GOLDENS, run

REPOSITORY = Path(__file__).parents[2]


def test_no_step_copies_the_pool(tiny):
    runner = tiny().runner
    spec, pool_bytes = runner.spec, runner.spec.num_bytes
    shape = f"f32[{','.join(map(str, spec.layer_shape))}]"
    for bucket in tiny().scheduler.buckets:
        aliased = 0
        for compiled in runner.compile_forward(bucket).programs:
            copies = [line for line in compiled.as_text().splitlines() if f"{shape}" in line and " copy(" in line]
            assert not copies, f"{bucket} copies a layer's pool:\n" + "\n".join(copies[:3])
            memory = compiled.memory_analysis()
            aliased += memory.alias_size_in_bytes
            assert memory.temp_size_in_bytes < pool_bytes / spec.num_arrays, "no room for a copy of even one layer"
        assert aliased >= pool_bytes, "the pool is donated, so outputs alias it"


def test_pool_stays_where_it_is(tiny):
    engine = tiny()
    pointers = [layer.unsafe_buffer_pointer() for layer in engine.runner.pool]
    for i in range(5):
        engine.add_request(str(i), {"prompt_token_ids": [5 + i] * (3 + 9 * i)}, SamplingParams(max_tokens=9))
    run(engine)
    assert [layer.unsafe_buffer_pointer() for layer in engine.runner.pool] == pointers


def test_pool_stays_where_it_is_while_blocks_are_copied_and_swapped(tiny):
    """Copy-on-write, inside the step, and blocks that come back from host memory change it in place."""
    engine = tiny(num_blocks=36, enable_prefix_caching=False, swap_blocks=100)
    pointers = [layer.unsafe_buffer_pointer() for layer in engine.runner.pool]
    for i in range(3):
        prompt = {"prompt_token_ids": [5 + i] * 21}
        engine.add_request(f"{i}", prompt, SamplingParams(n=4, max_tokens=24, seed=i, ignore_eos=True))
        beams = SamplingParams(n=4, use_beam_search=True, temperature=0, max_tokens=12, ignore_eos=True)
        engine.add_request(f"beams {i}", prompt, beams)
    run(engine)
    assert engine.blocks.num_copies > 10
    assert engine.scheduler.num_swaps_in > 0
    assert [layer.unsafe_buffer_pointer() for layer in engine.runner.pool] == pointers


def test_params_are_not_copied(tiny):
    """The checkpoint's arrays are the device's arrays (CPU): no second copy of the weights."""
    import checkpoints
    from tests.engine.support import GOLDENS

    params = checkpoints.load(GOLDENS / "models" / "llama", skip_tokenizer=True).params
    leaf = params["layers_0"]["mlp"]["gate_proj"]["kernel"]
    assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data


@pytest.mark.parametrize("seqs", [1, 2, 7, 32, 64, 100, 256, 1024])
@pytest.mark.parametrize("tiles", [1, 3, 16, 64])
def test_buckets_are_about_a_dozen_and_hold_every_step(seqs, tiles):
    buckets = make_buckets(seqs, tiles, 32)
    assert len(buckets) <= 13
    assert max(b.decode_rows for b in buckets if b.prefill_tiles == 0) == seqs
    assert any(b[:2] == (seqs, tiles) for b in buckets), "the fullest step has a shape"


def test_default_limits(tiny):
    from jpaged.config import EngineConfig

    limits: Limits = resolve_limits(EngineConfig(), tiny().model_config, np.dtype("float32"))
    assert limits.max_model_len == 256, "the model's own limit"
    assert len(limits.buckets) <= 13
    assert limits.tile_size == 16


def test_tiles_fill_the_products_of_the_device(tiny):
    """128 rows on GPU: queries times the heads that share keys, of which all of a latent's do."""
    sizes = {"llama": 64, "opt": 128, "deepseek_v3": 64}
    for name, size in sizes.items():
        config = checkpoints.load(GOLDENS / "models" / name, skip_tokenizer=True).config
        assert default_tile_size("gpu", config) == size
        assert default_tile_size("cpu", config) == 16


COUNT_COMPILATIONS = """
import json, sys
from jax import monitoring
counts = {}
def count(event, **kwargs):
    counts[event] = counts.get(event, 0) + 1
monitoring.register_event_listener(count)
from jpaged import LLM, SamplingParams
llm = LLM(model=sys.argv[1], compilation_cache_dir=sys.argv[2], max_num_seqs=2, max_model_len=64, block_size=4,
          num_gpu_blocks_override=64, max_num_batched_tokens=66)
llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4, seed=1), use_tqdm=False)
print(json.dumps({name.rsplit("/", 1)[1]: n for name, n in counts.items()}))
"""


def test_second_start_compiles_nothing(tmp_path):
    def start() -> dict:
        model = REPOSITORY / "tests" / "goldens" / "models" / "llama"
        done = subprocess.run(
            [sys.executable, "-c", COUNT_COMPILATIONS, str(model), str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        return json.loads(done.stdout.splitlines()[-1])

    first, second = start(), start()
    assert first["cache_misses"] > 0
    assert second.get("cache_misses", 0) == 0
    assert second["cache_hits"] >= first["cache_misses"]


def test_pool_sizes_do_not_follow_free_memory_to_the_byte():
    """The pool's shape is compiled into every step, so it must be the same at the next start."""
    from jpaged.runtime.kv_pool import cpu_budget, stable_blocks

    assert {cpu_budget(free) for free in range(9 << 30, 200 << 30, 123456789)} == {1 << 30}
    assert cpu_budget(5 << 30) == cpu_budget(7 << 30) == 512 << 20
    assert cpu_budget(0) == cpu_budget(1 << 30) == 256 << 20
    assert len({stable_blocks(n) for n in range(100_400, 101_400)}) == 1
    assert all(0.96 * n < stable_blocks(n) <= n for n in range(2, 5000))
