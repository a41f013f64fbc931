"""Decode attention: bytes of keys and values read a second, as a fraction of a copy within the device's memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import BLOCK_SIZE, noise_pool, scattered_tables
from benchmarks.gpu.part import Recorder, Skipped
from benchmarks.gpu.timing import copy_bandwidth, seconds
from pallas_kernels.paged_attention import paged_decode_attention

HEADS = ((32, 8), (64, 8), (40, 40))  # Llama-3-8B, Llama-3-70B, OPT-13B
HEAD_SIZE = 128
BATCHES = (1, 8, 32, 64, 256)
CONTEXTS = (128, 1024, 4096, 16384, 131072)
POOL_BYTES = 8 << 30
BEYOND_CACHE = 256 << 20
"""Bytes that are read before the same ones come again: several times an L2 cache."""
REPEATS = 8  # calls in one program, so that launching does not count


def run(recorder: Recorder, implementation: str) -> None:
    """Cases of batch x context x heads, all rows equally long."""
    dry = recorder.dry_run
    copy = recorder.case({"heads": "copy"}, lambda: {"GB/s": copy_bandwidth(1 << 20 if dry else 2 << 30) / 1e9})
    for heads, kv_heads in ((8, 2),) if dry else HEADS:
        size = 16 if dry else HEAD_SIZE
        kv = noise_pool(1 << 20 if dry else POOL_BYTES, kv_heads, size, jnp.bfloat16)
        cases = ((2, 40),) if dry else [(b, c) for c in CONTEXTS for b in BATCHES]
        for batch, context in cases:
            measure = functools.partial(_decode, kv, batch, context, heads, implementation, copy.get("GB/s"))
            recorder.case({"heads": f"{heads}/{kv_heads}", "batch": batch, "context": context}, measure)
        kv.delete()


def _decode(kv: jax.Array, batch: int, context: int, heads: int, implementation: str, copy: float | None) -> dict:
    num_blocks, _, kv_heads, _, size = kv.shape
    width = -(-context // BLOCK_SIZE)
    if batch * width > num_blocks - 1:
        raise Skipped("does not fit the pool")
    read = batch * context * 2 * kv_heads * size * kv.dtype.itemsize
    copies = max(1, min(BEYOND_CACHE // read + 1, (num_blocks - 1) // (batch * width), REPEATS))
    tables = jnp.asarray(scattered_tables(batch, context, num_blocks, copies))
    lengths = np.full(batch, context, np.int32)
    q = jax.random.normal(jax.random.key(1), (batch, heads, size), kv.dtype)
    attend = functools.partial(paged_decode_attention, scale=size**-0.5, implementation=implementation)

    @jax.jit
    def repeat(q: jax.Array, kv: jax.Array, tables: jax.Array, lengths: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda i, q: attend(q, kv, tables[i % copies], lengths), q)

    elapsed, _ = seconds(lambda q: repeat(q, kv, tables, lengths), q)
    elapsed /= REPEATS
    rate = (read + 2 * q.nbytes) / elapsed / 1e9
    row: dict[str, Any] = {"us": 1e6 * elapsed, "GB/s": rate}
    return row | ({"of copy": rate / copy} if copy else {})
