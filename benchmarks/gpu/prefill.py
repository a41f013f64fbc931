"""Prefill attention: FLOP/s beside a matrix product's and, for whole prompts, beside cuDNN's attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import noise_pool, scattered_tables
from benchmarks.gpu.part import Recorder, Skipped
from benchmarks.gpu.timing import matmul_flops, seconds
from pallas_kernels.paged_attention import paged_prefill_attention

# Rows, tokens cached before, queries of each row.
CASES = ((1, 0, 2048), (8, 0, 2048), (1, 0, 8192), (16, 0, 512), (4, 8192, 512), (1, 32768, 2048), (32, 1024, 64))
HEADS = ((32, 8), (40, 40))
DRY_CASES = ((2, 16, 16),)


def run(recorder: Recorder, _: str) -> None:
    """Each case in every implementation, the slow one last."""
    dry = recorder.dry_run
    row = recorder.case({"of": "matmul"}, lambda: {"TFLOP/s": _matmul(dry)})
    product = row.get("TFLOP/s")
    for implementation in ("triton", "cudnn", "mosaic", "xla"):
        for heads in ((4, 2),) if dry else HEADS:
            for case in DRY_CASES if dry else CASES:
                about = dict(zip(("rows", "cached", "queries"), case, strict=True))
                measure = functools.partial(_attend, case, heads, 16 if dry else 128, implementation, product)
                recorder.case({"of": implementation, "heads": "{}/{}".format(*heads)} | about, measure)


def _matmul(dry: bool) -> float:
    return matmul_flops(64 if dry else 8192, jnp.bfloat16) / 1e12


def _attend(
    case: tuple[int, int, int], heads: tuple[int, int], size: int, implementation: str, product: float | None
) -> dict:
    rows, cached, queries = case
    q = jax.random.normal(jax.random.key(1), (rows, queries, heads[0], size), jnp.bfloat16)
    cudnn = implementation == "cudnn"
    elapsed = _cudnn(q, heads[1], cached) if cudnn else _paged(q, heads[1], cached, implementation)
    seen = queries * cached + queries * (queries + 1) // 2  # pairs of a query and a token that it sees, in a row
    rate = 4 * rows * seen * heads[0] * size / elapsed / 1e12
    return {"us": 1e6 * elapsed, "TFLOP/s": rate} | ({"of matmul": rate / product} if product else {})


def _paged(q: jax.Array, kv_heads: int, cached: int, implementation: str) -> float:
    rows, queries, _, size = q.shape
    context = cached + queries
    kv = noise_pool(rows * (context + 16) * 4 * kv_heads * size + (1 << 20), kv_heads, size, q.dtype)
    tables = scattered_tables(rows, context, kv.shape[0], 1)[0]
    starts, lengths = np.full(rows, cached, np.int32), np.full(rows, queries, np.int32)
    attend = jax.jit(functools.partial(paged_prefill_attention, scale=size**-0.5, implementation=implementation))
    return seconds(lambda q: attend(q, kv, tables, starts, lengths), q)[0]


def _cudnn(q: jax.Array, kv_heads: int, cached: int) -> float:
    if cached:
        raise Skipped("measured on whole prompts only")
    if jax.default_backend() != "gpu":
        raise Skipped("needs an NVIDIA GPU")
    rows, queries, _, size = q.shape
    k, v = jax.random.normal(jax.random.key(2), (2, rows, queries, kv_heads, size), q.dtype)
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
    return seconds(lambda q: attend(q, k, v), q)[0]
