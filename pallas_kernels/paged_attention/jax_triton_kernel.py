"""The Triton kernel of `jax_triton`, and the three ways to call it: on a GPU, compiled for one, and interpreted."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from pallas_kernels.dispatch import current_device
from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.softcap import LOG2_E
from pallas_kernels.paged_attention.tiles import Tiles

try:
    import jax_triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f"the implementation 'jax_triton' needs the packages jax-triton and triton, and a jax that they know: {error}. "
        "Install them, or leave the implementation to be chosen"
    ) from error

PTX_VERSION = 87  # else Triton 3.9 writes 9.4, which ptxas of CUDA 13.0 does not know: jaxlib takes the first in PATH


@triton.jit
def paged_decode_jax_triton(
    q,  # [R, Hq, size]
    kv,  # [num_blocks, 2, kv_heads, block_size, size]
    scales,  # float32 [num_blocks, 2, kv_heads, block_size], or None
    tables,  # int32 [R, width]
    begins,  # int32 [R]
    ends,  # int32 [R]
    items,  # int32 [N, 5], see `splits.Splits`
    sums,  # float32 [N, kv_heads, group, size]
    highs,  # float32 [N, kv_heads, group]
    totals,  # float32 [N, kv_heads, group]
    width: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    block_size: tl.constexpr,
    factor: tl.constexpr,  # exp2(score * factor) is a score's exponential
    cap: tl.constexpr,  # in units of log2, or None
    lowest: tl.constexpr,
    tokens: tl.constexpr,  # of a tile
    rows: tl.constexpr,  # of a product, at least `group`
    columns: tl.constexpr,  # of a product, at least `size`
    number: tl.constexpr,  # type of the products' operands
):
    """Program (item, KV head): writes the item's partial results."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.maximum(tl.load(items + item * 5), 0)
    first, stop = tl.load(items + item * 5 + 1), tl.load(items + item * 5 + 2)
    begin, end = tl.load(begins + row), tl.load(ends + row)
    member, column = tl.arange(0, rows), tl.arange(0, columns)
    real, inside = member < group, column < size
    head = kv_head * group + member
    index = (row * kv_heads * group + head)[:, None] * size + column[None, :]
    query = tl.load(q + index, mask=real[:, None] & inside[None, :], other=0.0).to(number)
    high = tl.full((rows,), lowest, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    out = tl.zeros((rows, columns), tl.float32)
    for tile in range(first, stop):
        position = tile * tokens + tl.arange(0, tokens)
        known = position < end
        block = tl.load(tables + row * width + position // block_size, mask=known, other=0).to(tl.int64)
        key = (2 * block * kv_heads + kv_head) * block_size + position % block_size
        value = key + kv_heads * block_size
        lanes = known[:, None] & inside[None, :]
        keys = tl.load(kv + key[:, None] * size + column[None, :], mask=lanes, other=0.0).to(number)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if scales is not None:
            scores *= tl.load(scales + key, mask=known, other=0.0)[None, :]
        scores *= factor
        if cap is not None:  # cap * tanh(score / cap), as `softcap.soft_capped` has it
            scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634 / cap)))
        scores = tl.where((known & (position >= begin))[None, :], scores, lowest)
        higher = tl.maximum(high, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        if scales is not None:
            weights *= tl.load(scales + value, mask=known, other=0.0)[None, :]
        values = tl.load(kv + value[:, None] * size + column[None, :], mask=lanes, other=0.0).to(number)
        out = out * shrink[:, None] + tl.dot(weights.to(number), values, input_precision="ieee")
        high = higher
    at = (item * kv_heads + kv_head) * group + member
    tl.store(sums + at[:, None] * size + column[None, :], out, mask=real[:, None] & inside[None, :])
    tl.store(highs + at, high, mask=real)
    tl.store(totals + at, total, mask=real)


def attend_items(
    operands: tuple, shape: tuple[int, ...], options: dict[str, Any], tiles: Tiles, interpret: bool
) -> tuple[jax.Array, ...]:
    """Calls the kernel.

    Args:
      operands: the kernel's, up to `items`.
      shape: of the partial results: items, KV heads, query heads of each, head size.
      options: block_size, scale and cap.
    """
    q, tables = operands[0], operands[3]
    (_, kv_heads, group, size), cap = shape, options["cap"]
    constants = {
        "width": tables.shape[1],
        "kv_heads": kv_heads,
        "group": group,
        "size": size,
        "block_size": options["block_size"],
        "factor": options["scale"] * LOG2_E,
        "cap": None if cap is None else cap * LOG2_E,
        "lowest": LOWEST,
        "tokens": tiles.tokens,
        "rows": max(16, triton.next_power_of_2(group)),
        "columns": triton.next_power_of_2(size),
        # Triton's interpreter multiplies the bits of bfloat16.
        "number": tl.float32 if interpret else getattr(tl, q.dtype.name),
    }
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:-1], shape[:-1])]
    call = _interpreted if interpret else _compiled
    attend = jax.custom_batching.sequential_vmap(call(shape[:2], results, constants, tiles))
    return attend(*operands)


def _compiled(grid: tuple[int, ...], results: list, constants: dict[str, Any], tiles: Tiles) -> Callable:
    def call(*operands):
        return jax_triton.triton_call(
            *operands,
            kernel=paged_decode_jax_triton,
            out_type=results,
            grid=grid,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            compute_capability=current_device().capability,
            backend_options={"ptx_version": PTX_VERSION},
            **constants,
        )

    return call


def _mend_dead_code_rule() -> None:
    """jax-triton 0.4.1 has a rule for dead code that takes what JAX gave such rules before 0.12."""
    rules, primitive = partial_eval.dce_rules, jax_triton.triton_lib.triton_kernel_call_p
    rule: Any = rules[primitive]
    if jax.__version_info__ >= (0, 12) and len(inspect.signature(rule).parameters) == 2:
        rules[primitive] = lambda used, equation, *_: rule(used, equation)


_mend_dead_code_rule()


class _Host:
    """An array of NumPy as Triton's interpreter wants to see a tensor: with an address, already on the host."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.dtype = array, array.dtype

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "_Host":
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__) -> "_Host":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    stride = size

    def set_(self, *_) -> None:
        """The interpreter's copy is the original."""

    copy_ = set_


def _interpreted(grid: tuple[int, ...], results: list, constants: dict[str, Any], _: Tiles) -> Callable:
    if isinstance(paged_decode_jax_triton, triton.JITFunction):
        raise ImportError("set TRITON_INTERPRET=1 before Triton is imported to have its kernels interpreted")

    def run(*operands):
        made = [np.zeros(result.shape, result.dtype) for result in results]
        arrays = [None if x is None else _Host(np.ascontiguousarray(x)) for x in operands]
        launch: Any = paged_decode_jax_triton[grid]
        launch(*arrays, *map(_Host, made), **constants)
        return made

    return lambda *operands: jax.pure_callback(run, results, *operands, vmap_method="sequential")
