"""Whole decode steps with random weights: their time, and what reading the weights, keys and values takes."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.part import Recorder, Skipped
from benchmarks.gpu.random_models import bytes_read_per_step, model_config, random_model
from benchmarks.gpu.timing import copy_bandwidth, seconds
from jpaged.models.config import ModelConfig
from jpaged.runtime.kv_pool import KVPoolSpec
from jpaged.runtime.step import make_forward
from jpaged.scheduling.plan import Bucket, split_packed

BLOCK_SIZE, TILE_SIZE = 16, 16
CASES = {  # (batch, context) of rows that are all equally long
    "llama-3-8b": ((64, 1024), (1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024), (8, 8000)),
    "opt-13b": ((32, 512), (1, 512), (8, 512), (64, 512), (256, 100), (8, 2000)),
}
DRY_CASES = ((2, 40),)
STEP_BYTES = 3 << 30  # left free for what a step needs


def run(recorder: Recorder, name: str) -> None:
    """Decode steps of one model; the bandwidth that the floor is taken from is measured first."""
    dry = recorder.dry_run
    copy = recorder.case({"step": "copy"}, lambda: {"GB/s": copy_bandwidth(1 << 20 if dry else 2 << 30) / 1e9})
    config = model_config(name, tiny=dry)
    module, params = random_model(config, jnp.bfloat16)
    spec = KVPoolSpec.of(config, jnp.dtype(jnp.bfloat16), 2, BLOCK_SIZE)
    for batch, context in DRY_CASES if dry else CASES[name]:
        measure = functools.partial(_step, module, params, config, spec, batch, context, copy.get("GB/s"))
        recorder.case({"step": name, "batch": batch, "context": context}, measure)


def _step(
    module, params, config: ModelConfig, spec: KVPoolSpec, batch: int, context: int, copy: float | None
) -> dict[str, float]:
    width = -(-context // BLOCK_SIZE)
    num_blocks = batch * width + 1
    memory = jax.devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 1 << 62) - memory.get("bytes_in_use", 0)
    if num_blocks * spec.block_bytes + STEP_BYTES > free:
        raise Skipped("does not fit the memory")
    shape = (num_blocks, *spec.layer_shape[1:])
    pool = tuple(jnp.full(shape, 0.1, spec.dtype) for _ in range(spec.num_arrays))
    order = 1 + np.random.default_rng(0).permutation(batch * width).reshape(batch, width)
    tables = jnp.asarray(np.vstack([order, np.zeros((1, width))]), jnp.int32)  # the last row is the null row
    tokens = jax.random.randint(jax.random.key(0), (batch + 1, width * BLOCK_SIZE + 1), 0, config.vocab_size)
    bucket = Bucket(batch, 0)
    packed = _packed(bucket, context)
    forward = jax.jit(make_forward(module, spec.groups, BLOCK_SIZE, TILE_SIZE, bucket), donate_argnums=(1, 2))

    def step(state):
        pool, tables, _ = state
        return forward(params, pool, tables, tokens, packed)

    elapsed, state = seconds(step, (pool, tables, None))
    dispatch = []
    for _ in range(10):
        start = time.perf_counter()
        state = step(state)
        dispatch.append(time.perf_counter() - start)
        jax.block_until_ready(state)
    if not bool(jnp.isfinite(state[2].logits).all()):
        raise FloatingPointError("the step's logits are not finite")
    weights = bytes_read_per_step(config, params)
    cached = batch * context * spec.block_bytes // BLOCK_SIZE
    row = {
        "ms": 1e3 * elapsed,
        "tokens/s": batch / elapsed,
        "dispatch us": 1e6 * statistics.median(dispatch),
        "weights GB": weights / 1e9,
        "keys and values GB": cached / 1e9,
    }
    floor = (weights + cached) / (copy * 1e9) if copy else None
    return row | ({"floor ms": 1e3 * floor, "floor / step": floor / elapsed} if floor else {})


def _packed(bucket: Bucket, context: int) -> np.ndarray:
    """The plan of a step in which every row computes its last token: repeated, it writes what is there already."""
    packed = np.zeros(bucket.packed_size(1), np.int32)
    decode, _, results, *_, pieces = split_packed(packed, bucket, 1)
    decode[0] = results[0] = results[1] = np.arange(bucket.decode_rows)
    decode[1] = context - 1
    pieces[:, :-1] = -1
    return packed
