"""What `compile_report` compiles: kernels on shapes that differ in kind, and steps of large models."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.gpu.random_models import abstract_params, model_config
from jpaged.models.registry import build
from jpaged.runtime.kv_pool import KVPoolSpec
from jpaged.runtime.step import make_forward
from jpaged.scheduling.plan import Bucket
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.paged_attention import (
    QuantizedKV,
    SharedPrefixes,
    paged_decode_attention,
    paged_prefill_attention,
    pool_shape,
)

BLOCK_SIZE = 16
MEMBERS = 8  # rows of a piece that share blocks


def tile_size(heads: int, kv_heads: int) -> int:
    """Queries of a tile: what `jpaged.startup.default_tile_size` takes on GPU."""
    return 128 if heads == kv_heads else 64


class Case(NamedTuple):
    """A function of abstract arrays, and the kernels that must be in it."""

    function: Callable
    arguments: tuple[Any, ...]
    kernels: tuple[str, ...]
    donate: tuple[int, ...] = ()
    capability: tuple[int, int] = (8, 0)
    newest: tuple[int, int] = (99, 0)
    opcodes: tuple[str, ...] = ()
    """Instructions that each of the kernels must have."""


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _pool(dtype: str, kv_heads: int, size: int, quantised: str | None) -> Any:
    shape = pool_shape(1000, BLOCK_SIZE, kv_heads, size)
    if quantised:
        return QuantizedKV(_array(shape, quantised), _array(shape[:-1], "float32"))
    return _array(shape, dtype)


def attention(
    operation: str,
    dtype: str,
    heads: int,
    kv_heads: int,
    size: int,
    pool: str | None = None,
    shared: bool = False,
    **options: Any,
) -> Case:
    """Attention of 32 rows, or tiles; `shared`: where it decodes, of rows that share blocks."""
    kv, rows = _pool(dtype, kv_heads, size, pool), 32
    tables, row = _array((rows, 100), "int32"), _array((rows,), "int32")
    capability = (8, 9) if pool == "float8_e4m3fn" else (8, 0)
    options |= {"scale": size**-0.5}
    if operation == "decode":
        q, pieces = _array((rows, heads, size), dtype), None
        if shared:
            pieces = SharedPrefixes(_array((rows // 4, MEMBERS), "int32"), _array((rows // 4,), "int32"))

        def decode(q, kv, tables, row, pieces):
            return paged_decode_attention(q, kv, tables, row, shared=pieces, **options)

        arguments = (q, kv, tables, row, pieces)
        if options.get("implementation") == "mosaic":
            return Case(decode, arguments, ("paged_decode_mosaic_gpu_kernel",), **_HOPPER)
        kernels = ("paged_decode_shared",) if shared else ()
        kernels += ("paged_decode", "paged_decode_merge")
        if options.get("implementation") == "jax_triton":
            kernels = ("paged_decode_jax_triton",)
        return Case(decode, arguments, kernels, capability=capability)
    q = _array((rows, tile_size(heads, kv_heads), heads, size), dtype)
    function, arguments = functools.partial(paged_prefill_attention, **options), (q, kv, tables, row, row)
    if options.get("implementation") == "mosaic":
        return Case(function, arguments, ("paged_prefill_mosaic_gpu_kernel",), **_HOPPER)
    return Case(function, arguments, ("paged_prefill",), capability=capability)


_HOPPER: dict[str, Any] = {"capability": (9, 0), "newest": (9, 0), "opcodes": ("HGMMA", "UTMALDG")}
_EVERYTHING: dict[str, Any] = {"sliding_window": 100, "logit_soft_cap": 30.0, "return_lse": True}
_SHAPES: dict[str, tuple[str, int, int, int, str | None]] = {  # dtype, heads, KV heads, head size, quantised pool
    "bfloat16 32/8 x 128": ("bfloat16", 32, 8, 128, None),
    "bfloat16 40/40 x 128": ("bfloat16", 40, 40, 128, None),
    "bfloat16 64/8 x 128": ("bfloat16", 64, 8, 128, None),
    "bfloat16 9/3 x 64": ("bfloat16", 9, 3, 64, None),
    "bfloat16 32/32 x 80": ("bfloat16", 32, 32, 80, None),
    "bfloat16 32/32 x 96": ("bfloat16", 32, 32, 96, None),
    "bfloat16 8/4 x 256": ("bfloat16", 8, 4, 256, None),
    "float16 32/8 x 128": ("float16", 32, 8, 128, None),
    "float32 32/8 x 64": ("float32", 32, 8, 64, None),
    "float32 32/8 x 128": ("float32", 32, 8, 128, None),
    "float32 8/4 x 256": ("float32", 8, 4, 256, None),
    "int8 32/8 x 128": ("bfloat16", 32, 8, 128, "int8"),
    "e4m3 32/8 x 128": ("bfloat16", 32, 8, 128, "float8_e4m3fn"),
}
_SHARED = (
    "bfloat16 32/8 x 128",
    "bfloat16 64/8 x 128",
    "bfloat16 32/32 x 80",
    "bfloat16 8/4 x 256",
    "float32 32/8 x 128",
    "int8 32/8 x 128",
)
_MOSAIC = ("bfloat16 32/8 x 128", "bfloat16 40/40 x 128", "bfloat16 9/3 x 64", "float16 32/8 x 128")
_BY_NAME = {  # implementations that must be asked for
    ("mosaic", "decode"): _MOSAIC,
    ("mosaic", "prefill"): _MOSAIC,
    ("jax_triton", "decode"): (
        "bfloat16 32/8 x 128",
        "bfloat16 32/32 x 80",
        "bfloat16 8/4 x 256",
        "float32 32/8 x 128",
        "int8 32/8 x 128",
        "e4m3 32/8 x 128",
    ),
}


def _moves(dtype: str, quantised: str | None = None) -> dict[str, Case]:
    """Moves of 64 blocks of 32 layers."""
    pool = (_pool(dtype, 8, 128, quantised),) * 32
    blocks, one = _array((64,), "int32"), _array((), "int32")
    contents = jax.tree.map(lambda kv: _array((64, *kv.shape[1:]), kv.dtype), pool)
    name = quantised or dtype
    return {
        f"copy {name}": Case(copy_blocks, (pool, blocks, blocks, one), ("block_copy",), donate=(0,)),
        f"gather {name}": Case(gather_blocks, (pool, blocks), ("block_gather",)),
        f"scatter {name}": Case(scatter_blocks, (pool, blocks, contents), ("block_scatter",), donate=(0,)),
    }


def kernels() -> dict[str, Case]:
    """Every kernel."""
    cases = _moves("bfloat16") | _moves("bfloat16", "int8")
    for operation in ("decode", "prefill"):
        for name, (dtype, heads, kv_heads, size, pool) in _SHAPES.items():
            cases[f"{operation} {name}"] = attention(operation, dtype, heads, kv_heads, size, pool)
        for size in (128, 256):
            cases[f"{operation} bfloat16 32/8 x {size}, window, soft cap, lse"] = attention(
                operation, "bfloat16", 32, 8, size, **_EVERYTHING
            )
    for name in _SHARED:
        cases[f"decode {name}, shared"] = attention("decode", *_SHAPES[name], shared=True)
    for (implementation, operation), names in _BY_NAME.items():
        by_name = functools.partial(attention, operation, implementation=implementation)
        cases |= {f"{implementation} {operation} {name}": by_name(*_SHAPES[name]) for name in names}
        name = f"{implementation} {operation} bfloat16 32/8 x 128, window, soft cap, lse"
        cases[name] = by_name("bfloat16", 32, 8, 128, **_EVERYTHING)
    return cases


def _step(name: str, decodes: int, tiles: int, num_blocks: int = 4096) -> Case:
    """A step of a model in bfloat16: the decode lane and the tiles of a bucket."""
    dtype, rows, longest = jnp.dtype(jnp.bfloat16), 257, 2048
    config = model_config(name, tiny=False)
    module: nn.Module = build(config, dtype)
    bucket, tile = Bucket(decodes, tiles), tile_size(config.num_attention_heads, config.num_key_value_heads)
    pool = KVPoolSpec.of(config, dtype, num_blocks, BLOCK_SIZE)
    arguments = (
        abstract_params(module, dtype),
        pool.abstract(),
        _array((rows, longest // BLOCK_SIZE), "int32"),
        _array((rows, longest), "int32"),
        _array((bucket.packed_size(1),), "int32"),
    )
    kernels = ("block_copy", "paged_decode_shared", "paged_decode", "paged_decode_merge")
    kernels += ("paged_prefill",) if tiles else ()
    return Case(make_forward(module, pool.groups, BLOCK_SIZE, tile, bucket), arguments, kernels, donate=(1, 2))


def steps() -> dict[str, Case]:
    """Whole decode steps."""
    return {f"{name}, 64 rows": _step(name, 64, 0) for name in ("llama-3-8b", "opt-13b")}
