"""Every operation in one implementation against the float64 oracle, on shapes that hit every mask."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.part import Recorder
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.dispatch import ONLY
from pallas_kernels.paged_attention import (
    QuantizedKV,
    SharedPrefixes,
    paged_decode_attention,
    paged_prefill_attention,
    pool_shape,
    write_kv,
)
from pallas_kernels.paged_attention.quantized import dequantize, quantize
from pallas_kernels.paged_attention.reference import paged_attention


class Case(NamedTuple):
    """A shape. Rows have lengths at every edge: full, 1, block - 1, block, block + 1, 0."""

    heads: int
    kv_heads: int
    size: int
    block: int = 16
    width: int = 40
    rows: int = 8
    dtype: str = "bfloat16"
    pool: str | None = None
    window: int | None = None
    cap: float | None = None
    sinks: bool = False


CASES = {
    "Llama-3-8B": Case(32, 8, 128),
    "Llama-3-8B, float32": Case(32, 8, 128, dtype="float32"),
    "Llama-3-8B, float16": Case(32, 8, 128, dtype="float16"),
    "OPT-13B": Case(40, 40, 128),
    "Llama-3-70B, long": Case(64, 8, 128, width=300, rows=3),
    "group of 3, head size 64": Case(9, 3, 64, dtype="float32"),
    "head size 80, soft cap": Case(4, 2, 80, cap=5.0),
    "head size 96, all at once": Case(6, 2, 96, block=8, window=21, cap=20.0, sinks=True),
    "head size 256, MQA, window": Case(8, 1, 256, window=100),
    "blocks of 128, sinks": Case(8, 2, 64, block=128, width=6, sinks=True),
    "int8 pool": Case(32, 8, 128, pool="int8"),
    "e4m3 pool": Case(32, 8, 128, pool="float8_e4m3fn"),
}
DRY_CASES = {
    "tiny": Case(4, 2, 16, block=8, width=6, dtype="float32", pool="int8", window=21, sinks=True),
    "tiny, 16 bits": Case(4, 2, 64, block=8, width=6, rows=2, window=21, sinks=True),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def run(recorder: Recorder, implementation: str) -> None:
    """Largest errors; "ok" where they are within the tolerance, absolute and relative alike."""
    checks = {"decode": _decode, "shared": _shared, "fixed": _fixed, "prefill": _prefill}
    if implementation == "xla":  # which has no splits
        del checks["fixed"]
    if implementation in ONLY:  # which read what is shared row by row; what they do not have is Triton's
        del checks["shared"]
    if "paged_prefill_attention" not in ONLY.get(implementation, ["paged_prefill_attention"]):
        del checks["prefill"]
    for name, case in (DRY_CASES if recorder.dry_run else CASES).items():
        for operation, check in checks.items():
            about = {"operation": operation, "case": name, "dtype": case.pool or case.dtype}
            recorder.case(about, functools.partial(check, case, implementation))
    if implementation == "xla":  # the only implementation of this
        recorder.case({"operation": "write_kv"}, _write)
    if implementation in ONLY:
        return
    recorder.case({"operation": "copy_blocks"}, functools.partial(_copy, implementation))
    recorder.case({"operation": "gather and scatter"}, functools.partial(_gather_scatter, implementation))


class _Made(NamedTuple):
    q: jax.Array  # [R, C, Hq, D]
    kv: jax.Array | QuantizedKV
    tables: np.ndarray
    lengths: np.ndarray
    sinks: jax.Array | None
    options: dict[str, Any]


def _make(case: Case, queries: int, shared_blocks: int = 0) -> _Made:
    rng = np.random.default_rng(0)
    count = case.rows * case.width + 1
    kv = jnp.asarray(rng.standard_normal(pool_shape(count, case.block, case.kv_heads, case.size)), case.dtype)
    tables = 1 + rng.permutation(count - 1).reshape(case.rows, case.width).astype(np.int32)
    full = case.width * case.block
    edges = [full, 1, case.block - 1, case.block, case.block + 1, 0]
    lengths = (edges + [int(rng.integers(1, full)) for _ in range(case.rows)])[: case.rows]
    if shared_blocks:
        tables[:, :shared_blocks] = tables[0, :shared_blocks]
        lengths = [max(length, shared_blocks * case.block + 1) for length in lengths]
    return _Made(
        q=jnp.asarray(rng.standard_normal((case.rows, queries, case.heads, case.size)), case.dtype),
        kv=QuantizedKV(*quantize(kv, case.pool)) if case.pool else kv,
        tables=tables,
        lengths=np.array(lengths, np.int32),
        sinks=jnp.asarray(rng.standard_normal(case.heads), case.dtype) if case.sinks else None,
        options={"scale": case.size**-0.5, "sliding_window": case.window, "logit_soft_cap": case.cap},
    )


def _against_oracle(case: Case, made: _Made, got, starts: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    kv = np.asarray(dequantize(made.kv) if isinstance(made.kv, QuantizedKV) else made.kv)
    expected = paged_attention(made.q, kv, made.tables, starts, counts, sinks=made.sinks, **made.options)
    tolerance, row = TOLERANCE[case.dtype], {"ok": True}
    for name, x, wanted in zip(("error", "lse error"), got, expected, strict=True):
        x = np.asarray(x).astype(np.float64).reshape(wanted.shape)
        same = x == wanted  # minus infinity of padding too
        difference = np.where(same, 0.0, np.abs(x - np.where(same, 0.0, wanted)))
        row[name] = float(difference.max())
        row["ok"] = bool(row["ok"] and np.all(same | (difference <= tolerance * (1 + np.abs(wanted)))))
    return row | {"tolerance": tolerance}


def _decode(case: Case, implementation: str, made: _Made | None = None, **options) -> dict[str, Any]:
    made = _make(case, 1) if made is None else made
    attend = functools.partial(paged_decode_attention, return_lse=True, implementation=implementation, **made.options)
    got = jax.jit(functools.partial(attend, **options))(
        made.q[:, 0], made.kv, made.tables, made.lengths, sinks=made.sinks
    )
    return _against_oracle(case, made, got, made.lengths - 1, (made.lengths > 0).astype(np.int32))


def _shared(case: Case, implementation: str) -> dict[str, Any]:
    """All rows begin with the same two blocks."""
    rows = jnp.arange(case.rows, dtype=jnp.int32)[None]
    shared = SharedPrefixes(rows, jnp.array([2 * case.block], jnp.int32))
    return _decode(case, implementation, _make(case, 1, shared_blocks=2), shared=shared)


def _fixed(case: Case, implementation: str) -> dict[str, Any]:
    """Fixed splits: besides, the first row alone gives the same bits as among the others."""
    made, tokens = _make(case, 1), 128
    row = _decode(case, implementation, made, split_tokens=tokens)
    attend = functools.partial(
        paged_decode_attention, split_tokens=tokens, implementation=implementation, sinks=made.sinks, **made.options
    )
    together = jax.jit(attend)(made.q[:, 0], made.kv, made.tables, made.lengths)
    alone = jax.jit(attend)(made.q[:1, 0], made.kv, made.tables[:1], made.lengths[:1])
    same = bool((np.asarray(together[:1]) == np.asarray(alone)).all())
    return row | {"ok": row["ok"] and same, "bitwise": same}


def _prefill(case: Case, implementation: str) -> dict[str, Any]:
    """The last queries of each row, up to a number that divides nothing."""
    queries = 37
    made = _make(case, queries)
    starts = np.maximum(made.lengths - queries, 0).astype(np.int32)
    counts = (made.lengths - starts).astype(np.int32)
    attend = functools.partial(paged_prefill_attention, return_lse=True, implementation=implementation, **made.options)
    got = jax.jit(attend)(made.q, made.kv, made.tables, starts, counts, sinks=made.sinks)
    return _against_oracle(case, made, got, starts, counts)


def _pool(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal(pool_shape(20, 16, 4, 64)).astype(np.float32) for _ in range(3))


def _equal(got, expected) -> dict[str, Any]:
    """Bit by bit, the null block aside."""
    return {"ok": all((np.asarray(a)[1:] == b[1:]).all() for a, b in zip(got, expected, strict=True))}


def _write() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    (kv, *_), slots = _pool(rng), (16 + rng.permutation(19 * 16)[:40]).astype(np.int32)
    k, v = rng.standard_normal((2, 40, 4, 64)).astype(np.float32)
    got = jax.jit(write_kv, donate_argnums=0)(jnp.array(kv), k, v, slots)
    kv[slots // 16, 0, :, slots % 16], kv[slots // 16, 1, :, slots % 16] = k, v
    return _equal([got], [kv])


def _copy(implementation: str) -> dict[str, Any]:
    pool, sources, destinations = _pool(np.random.default_rng(0)), np.array([3, 4, 3, 0]), np.array([7, 9, 1, 0])
    copy = jax.jit(functools.partial(copy_blocks, implementation=implementation), donate_argnums=0)
    got = copy(tuple(map(jnp.array, pool)), sources, destinations, np.int32(3))
    for kv in pool:
        kv[destinations] = kv[sources]
    return _equal(got, pool)


def _gather_scatter(implementation: str) -> dict[str, Any]:
    pool, blocks, targets = _pool(np.random.default_rng(0)), np.array([5, 2, 19]), np.array([8, 1, 5])
    on_device = tuple(map(jnp.array, pool))
    gather = jax.jit(functools.partial(gather_blocks, implementation=implementation))
    scatter = jax.jit(functools.partial(scatter_blocks, implementation=implementation), donate_argnums=0)
    got = scatter(on_device, targets, gather(on_device, blocks))
    for kv in pool:
        kv[targets] = kv[blocks]
    return _equal(got, pool)
