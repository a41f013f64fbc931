"""Every implementation of paged attention against the float64 oracle: one table, on shapes chosen to hit every mask."""

import functools
import importlib.util
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    rows: int
    heads: int
    kv_heads: int
    size: int
    block: int
    width: int
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    dtype: str = "float32"
    pool: str | None = None  # of a quantised pool
    parts: int = 2  # 1: keys are values too


CASES = {
    "smollm2": Case(6, 9, 3, 64, 16, 23),
    "one row, long": Case(1, 4, 4, 16, 16, 40),
    "head size 80, soft cap": Case(3, 4, 2, 80, 16, 5, cap=5.0),
    "MQA, window": Case(8, 8, 1, 32, 8, 40, window=9),
    "all at once, bfloat16": Case(7, 6, 2, 96, 8, 40, window=21, cap=20.0, sinks=True, dtype="bfloat16"),
    "all at once, int8": Case(7, 6, 2, 64, 8, 40, window=150, cap=20.0, sinks=True, pool="int8"),
    "table of one block": Case(3, 9, 3, 64, 128, 1, sinks=True),
    "window of one": Case(6, 4, 2, 16, 8, 6, window=1),
    "float16, head size 128": Case(6, 4, 4, 128, 32, 10, dtype="float16"),
    "e4m3, head size 256": Case(4, 4, 1, 256, 16, 4, dtype="bfloat16", pool="float8_e4m3fn"),
    "more heads than a program": Case(2, 96, 1, 16, 16, 3),
}
XLA_CASES = {
    "odd head size, odd block": Case(8, 8, 1, 33, 12, 12, window=9),
    "more rows than a group": Case(40, 3, 3, 24, 8, 9),
    "latents": Case(7, 8, 1, 40, 8, 40, parts=1),
    "latents of two heads, int8, all at once": Case(7, 6, 2, 24, 8, 20, 30, 20.0, sinks=True, pool="int8", parts=1),
}
MOSAIC_CASES = {  # slow to interpret
    "all at once": Case(4, 4, 2, 64, 16, 9, window=70, cap=20.0, sinks=True, dtype="bfloat16"),
    "MHA, head size 128, blocks of 8": Case(2, 2, 2, 128, 8, 40, dtype="float16"),
}
RUNS = [(name, "xla") for name in CASES | XLA_CASES] + [(name, "triton") for name in CASES]
JAX_TRITON_RUNS = [(name, "jax_triton") for name in CASES if name != "more heads than a program"]
needs_jax_triton = pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is missing")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by the first test of jax_triton
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


class Made(NamedTuple):
    q: jax.Array  # [R, C, Hq, D]
    kv: jax.Array | QuantizedKV
    oracle_kv: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray
    sinks: jax.Array | None
    options: dict
    tolerance: float


def make(case: str, tile: int = 1, seed: int = 0) -> Made:
    """A pool of noise, tables without shared blocks, and lengths at every edge: 0, 1, block - 1, block, block + 1, full."""
    c = (CASES | XLA_CASES | MOSAIC_CASES)[case]
    rng = np.random.default_rng(seed)
    count = c.rows * c.width + 1
    kv = jnp.asarray(rng.standard_normal(pool_shape(count, c.block, c.kv_heads, c.size, c.parts)), c.dtype)
    if c.pool:
        kv = QuantizedKV(*quantize(kv, c.pool))
    tables = 1 + rng.permutation(count - 1).reshape(c.rows, c.width).astype(np.int32)
    full = c.width * c.block
    edges = [full, 1, c.block - 1, c.block, min(c.block + 1, full), 0]
    lengths = [edges[i] if i < len(edges) else rng.integers(0, full + 1) for i in range(c.rows)]
    for row, length in enumerate(lengths):
        tables[row, -(-length // c.block) :] = 0  # entries beyond the length are the null block
    return Made(
        q=jnp.asarray(rng.standard_normal((c.rows, tile, c.heads, c.size)), c.dtype),
        kv=kv,
        oracle_kv=np.asarray(dequantize(kv) if c.pool else kv),
        tables=tables,
        lengths=np.array(lengths, np.int32),
        sinks=jnp.asarray(rng.standard_normal(c.heads), c.dtype) if c.sinks else None,
        options={"scale": c.size**-0.5, "sliding_window": c.window, "logit_soft_cap": c.cap},
        tolerance=TOLERANCE[c.dtype],
    )


def check(got, expected, tolerance, padding):
    out, lse = (np.asarray(x).astype(np.float64) for x in got)
    np.testing.assert_allclose(out, expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected[1], atol=tolerance, rtol=tolerance)
    assert not out[padding].any(), "padding gives zeros"
    assert (lse[padding] == -np.inf).all(), "and nothing to merge"


def decode(made: Made, **options):
    attend = functools.partial(paged_decode_attention, **made.options, **options)
    return jax.jit(attend)(made.q[:, 0], made.kv, made.tables, made.lengths, sinks=made.sinks)


@pytest.mark.parametrize(
    ("case", "implementation"), RUNS + [pytest.param(*run, marks=needs_jax_triton) for run in JAX_TRITON_RUNS]
)
def test_decode(case, implementation):
    made = make(case)
    got = decode(made, return_lse=True, implementation=implementation)
    assert got[0].dtype == made.q.dtype
    real = (made.lengths > 0).astype(np.int32)
    oracle = paged_attention(
        made.q, made.oracle_kv, made.tables, made.lengths - 1, real, sinks=made.sinks, **made.options
    )
    check(got, [x[:, 0] for x in oracle], made.tolerance, made.lengths == 0)


@pytest.mark.parametrize(("case", "split"), [("all at once", 64), ("MHA, head size 128, blocks of 8", None)])
def test_decode_in_mosaic(case, split):
    """Splits of one tile, so that rows have several partial results; and of more tiles than there are stages."""
    made = make(case)
    got = decode(made, return_lse=True, split_tokens=split, implementation="mosaic")
    real = (made.lengths > 0).astype(np.int32)
    oracle = paged_attention(made.q, made.kv, made.tables, made.lengths - 1, real, sinks=made.sinks, **made.options)
    check(got, [x[:, 0] for x in oracle], made.tolerance, made.lengths == 0)


@pytest.mark.parametrize(("case", "tile"), [("all at once", 16), ("MHA, head size 128, blocks of 8", 150)])
def test_prefill_in_mosaic(case, tile):
    """Two programs of a tile in one case; warp groups, rows and tiles of tokens without work in both."""
    check_prefill(make(case, tile), tile, "mosaic")


def share(made: Made, block: int) -> SharedPrefixes:
    """Lets rows begin with the blocks of longer ones; pieces of two to three rows, and padding of both kinds."""
    order = np.argsort(-made.lengths)
    rows, lengths = np.full((4, 3), -1, np.int32), np.zeros(4, np.int32)
    for members in (order[:2], order[2:5]):
        common = max(made.lengths[members].min() - 1, 0) // block if len(members) > 1 else 0
        if common:
            made.tables[members, :common] = made.tables[members[0], :common]
            at = np.flatnonzero(lengths == 0)[0]
            rows[at, : len(members)], lengths[at] = members, common * block
    return SharedPrefixes(jnp.asarray(rows), jnp.asarray(lengths))


@pytest.mark.parametrize(("case", "implementation"), RUNS)
def test_shared_prefixes_change_nothing(case, implementation):
    made = make(case)
    made.lengths[-2:] = np.maximum(made.lengths[-2:], min(40, made.tables.shape[1] * (CASES | XLA_CASES)[case].block))
    made.tables[made.tables == 0] = 1  # lengths have grown: any block will do
    block = (CASES | XLA_CASES)[case].block
    shared = share(made, block)
    real = (made.lengths > 0).astype(np.int32)
    oracle = paged_attention(
        made.q, made.oracle_kv, made.tables, made.lengths - 1, real, sinks=made.sinks, **made.options
    )
    for members, length in zip(np.asarray(shared.rows), np.asarray(shared.lengths), strict=True):
        others = members[1:][members[1:] >= 0]
        made.tables[others, : length // block] = 1  # what is shared is read from the first member's table alone
    got = decode(made, return_lse=True, implementation=implementation, shared=shared)
    check(got, [x[:, 0] for x in oracle], made.tolerance, made.lengths == 0)


def test_shared_prefixes_are_shared_in_the_test_above():
    made = make("smollm2")
    assert (np.asarray(share(made, 16).lengths) > 0).sum() == 1
    assert (np.asarray(share(make("more rows than a group"), 8).lengths) > 0).sum() == 2


@pytest.mark.parametrize(
    ("case", "implementation", "tile"),
    [(*run, 16) for run in RUNS] + [("smollm2", "xla", 1), ("smollm2", "xla", 5), ("MQA, window", "triton", 37)],
)
def test_prefill(case, implementation, tile):
    """Tiles that end at the rows' lengths, from empty to full, after contexts of which some are long."""
    check_prefill(make(case, tile), tile, implementation)


def check_prefill(made, tile, implementation):
    starts = np.maximum(made.lengths - tile, 0).astype(np.int32)
    counts = (made.lengths - starts).astype(np.int32)
    attend = functools.partial(paged_prefill_attention, **made.options, return_lse=True, implementation=implementation)
    got = jax.jit(attend)(made.q, made.kv, made.tables, starts, counts, sinks=made.sinks)
    oracle = paged_attention(made.q, made.oracle_kv, made.tables, starts, counts, sinks=made.sinks, **made.options)
    check(got, oracle, made.tolerance, np.arange(tile) >= counts[:, None])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_without_lse_the_same_output(implementation):
    made = make("smollm2")
    both = decode(made, return_lse=True, implementation=implementation)
    np.testing.assert_allclose(both[0], decode(made, implementation=implementation), atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "triton", pytest.param("jax_triton", marks=needs_jax_triton)])
def test_the_null_block_is_never_read(implementation):
    """Whatever padding wrote there: a row's result does not feel it."""
    made = make("smollm2")
    one = decode(made, implementation=implementation)
    other = decode(
        made._replace(kv=made.kv.at[0].set(7.0 if implementation == "xla" else jnp.nan)),
        implementation=implementation,
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", ["triton", pytest.param("jax_triton", marks=needs_jax_triton)])
def test_fixed_splits_do_not_depend_on_the_batch(implementation):
    """Bitwise: alone, among others, in another place. Shares that follow the batch cut the row elsewhere."""
    made = make("one row, long")
    crowd = made._replace(
        q=jnp.concatenate([made.q[:, :] * 0.5, made.q, made.q]),
        tables=np.concatenate([made.tables] * 3),
        lengths=np.concatenate([made.lengths, made.lengths, made.lengths // 3]),
    )
    alone = decode(made, split_tokens=128, implementation=implementation)
    np.testing.assert_array_equal(alone[0], decode(crowd, split_tokens=128, implementation=implementation)[1])
    shared = SharedPrefixes(jnp.asarray([[0, 1, 2]]), jnp.asarray([128]))
    among_sharers = decode(crowd, split_tokens=128, implementation=implementation, shared=shared)
    np.testing.assert_array_equal(alone[0], among_sharers[1])
    wider = made._replace(tables=np.pad(made.tables, ((0, 0), (0, 40))))
    np.testing.assert_array_equal(alone, decode(wider, split_tokens=128, implementation=implementation))
    assert (np.asarray(alone) != np.asarray(decode(made, split_tokens=256, implementation=implementation))).any()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_write_kv(count):
    made = make("smollm2")
    kv = made.kv
    rng = np.random.default_rng(1)
    blocks, _, kv_heads, block, size = kv.shape
    k = rng.standard_normal((count, kv_heads, size)).astype(np.float32)
    slots = (block + rng.permutation((blocks - 1) * block)[:count]).astype(np.int32)
    got = np.asarray(jax.jit(write_kv)(kv, k, k + 1, slots))
    expected = np.array(kv)
    for i, slot in enumerate(slots):
        expected[slot // block, 0, :, slot % block] = k[i]
        expected[slot // block, 1, :, slot % block] = k[i] + 1
    np.testing.assert_array_equal(got[1:], expected[1:])  # the null block may hold anything


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_write_keys_alone(count, quantised):
    kv = jnp.zeros(pool_shape(3, 4, 2, 16, parts=1))
    k = np.random.default_rng(0).integers(-127, 128, (count, 2, 16)).astype(np.float32)
    k[..., 0] = 127  # so that int8 is exact
    slots = np.arange(4, 4 + count, dtype=np.int32)
    pool = QuantizedKV(*quantize(kv, "int8")) if quantised else kv
    got = jax.jit(write_kv)(pool, k, None, slots)
    got = np.array(dequantize(got) if quantised else got)
    np.testing.assert_array_equal(got[slots // 4, 0, :, slots % 4], k)
    got[slots // 4, 0, :, slots % 4] = 0
    assert not got[1:].any()


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.5 / 127), ("float8_e4m3fn", 1 / 16)])
def test_quantised_within_the_stated_bound(dtype, bound):
    """Half a step of the largest value with int8; a sixteenth of the value itself with e4m3 (above its smallest)."""
    kv = QuantizedKV(jnp.zeros(pool_shape(3, 4, 2, 16), dtype), jnp.zeros((3, 2, 2, 4)))
    k = np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32)
    k[0] = 0.0  # a vector of zeros has no scale
    slots = np.array([4, 5, 6, 7, 8], np.int32)
    got = dequantize(jax.jit(write_kv)(kv, k, 2 * k, slots))
    for side, wanted in ((0, k), (1, 2 * k)):
        error = np.abs(np.asarray(got)[slots // 4, side, :, slots % 4] - wanted)
        largest = np.abs(wanted).max(-1, keepdims=True)
        size = largest if dtype == "int8" else np.maximum(np.abs(wanted), largest / 448)
        assert (error <= bound * size * 1.0001).all()


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.5 / 127), ("float8_e4m3fn", 1 / 16)])
def test_attention_over_a_quantised_pool_within_the_stated_bound(dtype, bound, implementation):
    """Of docs/kernels.md, against the float64 oracle over what was written, not over what was kept of it."""
    made = make("smollm2")
    quantised = made._replace(kv=QuantizedKV(*quantize(made.kv, dtype)))
    got = np.asarray(decode(quantised, implementation=implementation))
    real = (made.lengths > 0).astype(np.int32)
    wanted, _ = paged_attention(made.q, made.kv, made.tables, made.lengths - 1, real, **made.options)
    q, kv = np.abs(made.q[:, 0]), np.abs(made.kv)
    key, value = float(kv[:, 0].max()), float(kv[:, 1].max())
    shift = made.options["scale"] * q.sum(-1, keepdims=True) * bound * key  # of a score, at most [R, Hq, 1]
    limit = bound * value + value * np.expm1(2 * shift)
    error = np.abs(got - wanted[:, 0])
    assert (error <= limit).all()
    typical = {"int8": 0.01, "float8_e4m3fn": 0.04}[dtype]
    assert np.sqrt((error**2).mean() / (wanted**2).mean()) < typical, "far below the bound, which takes signs to agree"


def test_a_batch_of_pools():
    """`jax.vmap` over everything is a loop of calls."""
    made = [make("smollm2", seed=seed) for seed in (0, 1)]
    q, kv, tables = (jnp.stack(x) for x in zip(*[(m.q[:, 0], m.kv, jnp.asarray(m.tables)) for m in made], strict=True))
    attend = functools.partial(paged_decode_attention, **made[0].options, implementation="triton")
    got = jax.vmap(attend, in_axes=(0, 0, 0, None))(q, kv, tables, made[0].lengths)
    for i, m in enumerate(made):
        np.testing.assert_allclose(got[i], decode(m, implementation="triton"), atol=1e-6)


def test_no_derivative_but_a_clear_word():
    made = make("table of one block")
    with pytest.raises(NotImplementedError, match="without a pool"):
        jax.grad(lambda q: paged_decode_attention(q, made.kv, made.tables, made.lengths, **made.options).sum())(
            made.q[:, 0]
        )


def test_implementations_by_name(monkeypatch):
    made = make("odd head size, odd block")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        decode(made, implementation="cuda")
    with pytest.raises(ValueError, match="no head size 33"):
        decode(made, implementation="triton")
    monkeypatch.setenv("JPAGED_KERNELS", "triton")
    with pytest.raises(ValueError, match="no head size 33"):
        decode(made)
    decode(made, implementation="xla")  # the argument comes before the environment
    with pytest.raises(ValueError, match="in mosaic reads pools of bfloat16 or float16"):
        decode(made, implementation="mosaic")
    with pytest.raises(ValueError, match="keys that are values too"):
        decode(make("latents"), implementation="triton")
