"""What moves keys and values: writes of tokens, copies of blocks, and blocks on their way to the host and back."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.part import Recorder
from benchmarks.gpu.timing import copy_bandwidth, seconds
from jpaged.runtime.swapping import Swapper, Traffic
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.paged_attention import pool_shape, write_kv

Pool = tuple[jax.Array, ...]


def run(recorder: Recorder, _: str) -> None:
    """On a pool of Llama-3-8B's shape: 32 layers, 8 KV heads of 128, blocks of 16 tokens."""
    dry = recorder.dry_run
    layers, shape = (2, pool_shape(64, 16, 2, 16)) if dry else (32, pool_shape(2048, 16, 8, 128))
    recorder.case({"operation": "copy"}, lambda: {"GB/s": copy_bandwidth(1 << 20 if dry else 2 << 30) / 1e9})
    pool: Pool = tuple(jnp.ones(shape, jnp.bfloat16) for _ in range(layers))
    block_bytes = sum(kv.nbytes for kv in pool) // shape[0]
    for tokens in (16,) if dry else (1, 64, 256, 2048, 8192):
        pool = _donated(recorder, {"operation": "write_kv", "tokens": tokens}, pool, functools.partial(_write, tokens))
    for blocks in (8,) if dry else (1, 16, 64, 256):
        chosen = 1 + np.random.default_rng(0).permutation(shape[0] - 1)[: 2 * blocks].astype(np.int32)
        sources, destinations = chosen[:blocks], chosen[blocks:]
        about = {"blocks": blocks}
        move = functools.partial(_copy, sources, destinations, 2 * blocks * block_bytes)
        pool = _donated(recorder, {"operation": "copy_blocks"} | about, pool, move)
        move = functools.partial(_gather_scatter, sources, destinations, 4 * blocks * block_bytes)
        pool = _donated(recorder, {"operation": "gather and scatter"} | about, pool, move)
        pool = _donated(recorder, {"operation": "swap"} | about, pool, functools.partial(_swap, chosen, block_bytes))


def _donated(recorder: Recorder, about: dict, pool: Pool, measure: Callable[[Pool], tuple[dict, Pool]]) -> Pool:
    """A case that updates the pool in place. The pool afterwards; a new one if the case failed after it was donated."""
    kept = [pool]

    def case() -> dict:
        row, kept[0] = measure(pool)
        return row

    shapes = [(kv.shape, kv.dtype) for kv in pool]
    recorder.case(about, case)
    if any(kv.is_deleted() for kv in kept[0]):
        return tuple(jnp.ones(shape, dtype) for shape, dtype in shapes)
    return kept[0]


def _rate(num_bytes: int, elapsed: float) -> dict:
    return {"us": 1e6 * elapsed, "GB/s": num_bytes / elapsed / 1e9}


def _write(tokens: int, pool: Pool) -> tuple[dict, Pool]:
    blocks, _, heads, block_size, size = pool[0].shape
    k, v = jax.random.normal(jax.random.key(0), (2, tokens, heads, size), pool[0].dtype)
    slots = (block_size + np.random.default_rng(0).permutation((blocks - 1) * block_size)[:tokens]).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def write(pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pool:
        return tuple(write_kv(kv, k, v, slots) for kv in pool)

    elapsed, pool = seconds(lambda pool: write(pool, k, v, slots), pool)
    return _rate(2 * len(pool) * (k.nbytes + v.nbytes), elapsed), pool


def _copy(sources: np.ndarray, destinations: np.ndarray, num_bytes: int, pool: Pool) -> tuple[dict, Pool]:
    move = jax.jit(copy_blocks, donate_argnums=0)
    elapsed, pool = seconds(lambda pool: move(pool, sources, destinations, np.int32(len(sources))), pool)
    return _rate(num_bytes, elapsed), pool


def _gather_scatter(sources: np.ndarray, destinations: np.ndarray, num_bytes: int, pool: Pool) -> tuple[dict, Pool]:
    gather, scatter = jax.jit(gather_blocks), jax.jit(scatter_blocks, donate_argnums=0)
    elapsed, pool = seconds(lambda pool: scatter(pool, destinations, gather(pool, sources)), pool)
    return _rate(num_bytes, elapsed), pool


def _swap(chosen: np.ndarray, block_bytes: int, pool: Pool) -> tuple[dict, Pool]:
    """To pinned host memory and back; the swapper's own clock, which counts a block's bytes once each way."""
    blocks, back = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    every = np.arange(len(blocks), dtype=np.int32)
    swapper = Swapper(block_bytes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for _ in range(2):  # compiles; the second time for a pool that was donated before
        pool = swapper.swap_in(pool, swapper.swap_out(pool, blocks), every, back)
    swapper.out, swapper.back = Traffic(), Traffic()
    for _ in range(5):
        pool = swapper.swap_in(pool, swapper.swap_out(pool, blocks), every, back)
    out, into = swapper.out, swapper.back
    return {"out GB/s": out.bytes / out.seconds / 1e9, "in GB/s": into.bytes / into.seconds / 1e9}, pool
