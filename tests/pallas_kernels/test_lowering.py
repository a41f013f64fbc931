"""Triton kernels are lowered for a GPU that is not there: the interpreter accepts much that the compiler refuses."""

import functools

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.paged_attention import (
    QuantizedKV,
    SharedPrefixes,
    paged_decode_attention,
    paged_prefill_attention,
    pool_shape,
)

GPU = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda"))
OPTIONS = {"scale": 0.1, "return_lse": True, "logit_soft_cap": 5.0, "sliding_window": 100}


def kernels_in(function, *avals) -> int:
    """Triton kernels in what `function` is lowered to for CUDA, where nothing says which implementation to take."""
    with jax.sharding.use_abstract_mesh(GPU):
        lowered = jax.jit(function).trace(*avals).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("__gpu$xla.gpu.triton")


@pytest.mark.parametrize(
    ("dtype", "size"), [*(("bfloat16", size) for size in (64, 80, 96, 128, 256)), ("float32", 80), ("float16", 128)]
)
def test_attention_is_lowered_to_kernels(dtype, size, monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    aval, rows, group = jax.ShapeDtypeStruct, 4, 3
    kv = aval(pool_shape(100, 16, 2, size), dtype)
    tables, row = aval((rows, 100), "int32"), aval((rows,), "int32")
    decode = functools.partial(paged_decode_attention, **OPTIONS)
    assert kernels_in(decode, aval((rows, 2 * group, size), dtype), kv, tables, row) == 2  # the splits and their merge
    shared = SharedPrefixes(aval((2, 8), "int32"), aval((2,), "int32"))

    def decode_shared(q, kv, tables, lengths, shared):
        return decode(q, kv, tables, lengths, shared=shared)

    assert kernels_in(decode_shared, aval((rows, 2 * group, size), dtype), kv, tables, row, shared) == 3
    prefill = functools.partial(paged_prefill_attention, **OPTIONS)
    assert kernels_in(prefill, aval((rows, 16, 2 * group, size), dtype), kv, tables, row, row) == 1


@pytest.mark.parametrize("size", [64, 128])
def test_mosaic_is_lowered_where_it_is_asked_for(size):
    aval, rows = jax.ShapeDtypeStruct, 4
    kv, row = aval(pool_shape(100, 16, 2, size), "bfloat16"), aval((rows,), "int32")
    tables = aval((rows, 100), "int32")
    decode = functools.partial(paged_decode_attention, **OPTIONS, implementation="mosaic")
    prefill = functools.partial(paged_prefill_attention, **OPTIONS, implementation="mosaic")
    q, queries = aval((rows, 6, size), "bfloat16"), aval((rows, 50, 6, size), "bfloat16")
    for attend, arguments in ((decode, (q, kv, tables, row)), (prefill, (queries, kv, tables, row, row))):
        with jax.sharding.use_abstract_mesh(GPU):
            lowered = jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_a_batch_and_a_part_of_the_heads_on_each_device(implementation):
    """`jax.vmap` over everything, and `shard_map` over heads."""
    aval, rows, size = jax.ShapeDtypeStruct, 4, 64
    kv, tables, row = pool_shape(100, 16, 2, size), (rows, 100), (rows,)
    shapes = [((rows, 6, size), "bfloat16"), (kv, "bfloat16"), (tables, "int32"), (row, "int32")]
    decode = functools.partial(paged_decode_attention, scale=0.1, implementation=implementation)
    with jax.sharding.use_abstract_mesh(GPU):
        arguments = [aval((2, *shape), dtype) for shape, dtype in shapes]
        jax.jit(jax.vmap(decode)).trace(*arguments).lower(lowering_platforms=("cuda",))
    device = GPU.abstract_device
    two = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(two):
        specs = PartitionSpec(None, "heads"), PartitionSpec(None, None, "heads"), PartitionSpec(), PartitionSpec()
        divided = jax.shard_map(decode, in_specs=specs, out_specs=specs[0])
        arguments = [aval(shape, dtype) for shape, dtype in shapes]
        jax.jit(divided).trace(*arguments).lower(lowering_platforms=("cuda",))


def test_a_head_size_without_a_kernel_falls_back(monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    aval = jax.ShapeDtypeStruct
    kv, row = aval(pool_shape(10, 16, 2, 33), "float32"), aval((4,), "int32")
    decode = functools.partial(paged_decode_attention, scale=0.1)
    assert kernels_in(decode, aval((4, 6, 33), "float32"), kv, aval((4, 8), "int32"), row) == 0


@pytest.mark.parametrize("pool", ["int8", "float8_e4m3fn"])
def test_attention_over_a_quantised_pool(pool, monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    aval, shape = jax.ShapeDtypeStruct, pool_shape(100, 16, 2, 64)
    kv = QuantizedKV(aval(shape, pool), aval(shape[:-1], "float32"))
    tables, row = aval((4, 100), "int32"), aval((4,), "int32")
    decode = functools.partial(paged_decode_attention, **OPTIONS)
    assert kernels_in(decode, aval((4, 6, 64), "bfloat16"), kv, tables, row) == 2


def test_moves_of_blocks_are_one_kernel(monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    aval, shape = jax.ShapeDtypeStruct, pool_shape(100, 16, 2, 40)
    layer = QuantizedKV(aval(shape, "float8_e4m3fn"), aval(shape[:-1], "float32"))
    pool, blocks = (layer, aval(shape, "bfloat16")), aval((8,), "int32")
    contents = jax.tree.map(lambda kv: aval((8, *kv.shape[1:]), kv.dtype), pool)
    assert kernels_in(copy_blocks, pool, blocks, blocks, aval((), "int32")) == 1
    assert kernels_in(gather_blocks, pool, blocks) == 1
    assert kernels_in(scatter_blocks, pool, blocks, contents) == 1
