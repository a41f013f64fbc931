"""Moves of whole blocks in Pallas's Triton backend: one launch for all layers, whatever the number of blocks.

A block of one layer is a run of E numbers. A program (block, piece) moves that piece of the block in every layer. In
XLA a copy is a loop that the host takes part in, and of a launch a layer.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Device

PIECE_BYTES = 4096  # of a program and a layer: 32 bytes a thread, two of the widest loads


def unsupported(pool: Any, device: Device) -> str | None:
    """Why these kernels cannot take this pool on this device; None: they can."""
    if device.platform != "cuda" or device.capability < 80:
        return "needs an NVIDIA GPU of capability 8.0 or more"
    if any(leaf.dtype.itemsize == 1 and 2**31 <= leaf.size <= 2**32 for leaf in jax.tree.leaves(pool)):
        return "would take 32-bit offsets for a pool between 2 and 4 GiB of 8-bit values"
    return None


def _move(source, destination, from_block, to_block, index) -> None:
    """One piece of one block of one layer; references are to [blocks, E]."""
    length = source.shape[1]
    piece = _piece(source.dtype, length)

    @pl.when(index * piece < length)
    def move():
        columns = index * piece + jnp.arange(piece)
        if length % piece:
            zero = 0.0 if jnp.issubdtype(source.dtype, jnp.floating) else 0
            inside = columns < length
            values = plgpu.load(source.at[from_block, columns], mask=inside, other=zero)
            plgpu.store(destination.at[to_block, columns], values, mask=inside)
        else:
            plgpu.store(destination.at[to_block, columns], plgpu.load(source.at[from_block, columns]))


def _piece(dtype: jnp.dtype, length: int) -> int:
    return min(PIECE_BYTES // jnp.dtype(dtype).itemsize, pl.next_power_of_2(length))


def _copy_kernel(sources, destinations, count, *pools):
    results = pools[len(pools) // 2 :]  # the same memory as the first half
    i, index = pl.program_id(0), pl.program_id(1)

    @pl.when(i < count[0])
    def copy():
        for kv in results:
            _move(kv, kv, sources[i], destinations[i], index)


def _gather_kernel(blocks, *arrays):
    i, index, half = pl.program_id(0), pl.program_id(1), len(arrays) // 2
    for kv, contents in zip(arrays[:half], arrays[half:], strict=True):
        _move(kv, contents, blocks[i], i, index)


def _scatter_kernel(blocks, *arrays):
    i, index, third = pl.program_id(0), pl.program_id(1), len(arrays) // 3
    for new, kv in zip(arrays[:third], arrays[2 * third :], strict=True):
        _move(new, kv, i, blocks[i], index)


def _launch(kernel: Callable, name: str, indices: list, read: Any, updated: Any, made: Any, interpret: bool) -> Any:
    """A program for each index and piece. `updated` is returned, in place; else arrays like `made` are."""
    inputs = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves((read, updated))]
    results, structure = jax.tree.flatten(updated if made is None else made)
    pieces = max(-(-math.prod(x.shape[1:]) // _piece(x.dtype, math.prod(x.shape[1:]))) for x in results)
    first = len(indices) + len(inputs) - len(results)
    out = pl.pallas_call(
        kernel,
        grid=(indices[0].shape[0], pieces),
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], math.prod(x.shape[1:])), x.dtype) for x in results],
        input_output_aliases={first + i: i for i in range(len(results))} if made is None else {},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(*indices, *inputs)
    return jax.tree.unflatten(structure, [x.reshape(like.shape) for x, like in zip(out, results, strict=True)])


def copy_blocks(pool, sources: jax.Array, destinations: jax.Array, count: jax.Array, *, interpret: bool = False):
    """See `api.copy_blocks`. Programs beyond `count` end at once."""
    indices = [sources, destinations, jnp.reshape(count, (1,))]
    return _launch(_copy_kernel, "block_copy", indices, (), pool, None, interpret)


def gather_blocks(pool, blocks: jax.Array, *, interpret: bool = False):
    """See `api.gather_blocks`."""
    made = jax.tree.map(lambda kv: jax.ShapeDtypeStruct((blocks.shape[0], *kv.shape[1:]), kv.dtype), pool)
    return _launch(_gather_kernel, "block_gather", [blocks], pool, (), made, interpret)


def scatter_blocks(pool, blocks: jax.Array, contents, *, interpret: bool = False):
    """See `api.scatter_blocks`."""
    return _launch(_scatter_kernel, "block_scatter", [blocks], contents, pool, None, interpret)
