"""Arrays that a checkpoint is read into: aligned, cast and transposed on the way, filled by a few threads."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import CheckpointError
from checkpoints.gguf_quants import GGMLType

ALIGNMENT = 64
"""Bytes. XLA's CPU client takes a NumPy buffer without a copy if it is aligned so; a test proves it."""

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Element types that parameters can be loaded as."""

TILE = 1 << 16
"""Weights handled at a time: 256 KB of float32, which stay in the L2 cache from one pass to the next."""

_SIDE = 256  # rows and columns of a tile when transposing

Progress = Callable[[int, int, str], None]
"""progress(done bytes, total bytes, name of the tensor just worked on), called from the loading thread."""


@dataclass(frozen=True)
class Task:
    """A piece of loading: independent of every other piece, so that threads can take them in any order."""

    what: str
    """Name of the tensor, for progress."""

    nbytes: int
    """Bytes of the parameters that it makes."""

    run: Callable[[], None]
    """Does it."""


def as_dtype(dtype: object) -> np.dtype:
    """The NumPy dtype for a name ("bfloat16") or anything that `numpy.dtype` takes (`jnp.bfloat16`).

    Raises:
        CheckpointError: not one of `DTYPES`.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name  # type: ignore[call-overload]
        return DTYPES[name]
    except (KeyError, TypeError):
        raise CheckpointError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}") from None


def aligned_arrays(shapes: Iterable[tuple[int, ...]], dtype: np.dtype) -> list[NDArray]:
    """Uninitialised C-contiguous arrays, each at a multiple of `ALIGNMENT`, cut from one block of memory.

    One block, because NumPy asks for huge pages for large allocations: that halves the cost of touching the
    memory for the first time, and spares the processor's address cache whenever a model reads all its
    weights. The block is freed when the last of the arrays is gone.
    """
    shapes = list(shapes)
    sizes = [prod(shape) * dtype.itemsize for shape in shapes]
    starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    block = np.empty(starts[-1] + ALIGNMENT, np.uint8)
    block = block[-block.ctypes.data % ALIGNMENT :]
    return [
        block[start : start + size].view(dtype).reshape(shape)
        for shape, size, start in zip(shapes, sizes, starts, strict=False)
    ]


class Meter:
    """Counts the bytes of the parameters that have been made, and tells a `Progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._done, self._progress = total, 0, progress

    def advance(self, nbytes: int, what: str) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total, what)


def run_tasks(tasks: Sequence[Task], meter: Meter) -> None:
    """Runs all tasks on a thread for each core, at most 8, and reports after each one.

    The first exception of a task is raised here, after the tasks that were already running have ended.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="jpaged-load")
    try:
        for task, _ in zip(tasks, pool.map(lambda task: task.run(), tasks), strict=True):
            meter.advance(task.nbytes, task.what)
    finally:
        pool.shutdown(cancel_futures=True)


def copy_cast(source: NDArray, target: NDArray) -> None:
    """target[...] = source, cast; tile by tile if `source` is a transposed view.

    source, target: same shape, one or two dimensions, any float types.
    """
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        np.copyto(target, source, casting="unsafe")
        return
    # Through a small padded tile. Straight from rows that lie a power of two apart, the cache lines of a
    # column fall on the same few cache sets and evict each other: four times slower for [4096, 4096]. Casting
    # comes first, while both sides are contiguous.
    tile = np.empty((_SIDE, _SIDE + 32), target.dtype)
    for top in range(0, target.shape[0], _SIDE):
        for left in range(0, target.shape[1], _SIDE):
            piece = source[top : top + _SIDE, left : left + _SIDE]
            part = tile[: piece.shape[1], : piece.shape[0]]
            np.copyto(part, piece.T, casting="unsafe")
            np.copyto(target[top : top + _SIDE, left : left + _SIDE], part.T)


def expand(raw: NDArray[np.uint8], ggml_type: GGMLType, target: NDArray, *, transpose: bool) -> None:
    """Dequantises rows of packed blocks into `target`.

    raw: uint8 [rows, bytes per row].
    target: any float type, [rows, weights] or, with `transpose`, [weights, rows].
    """
    blocks = raw.shape[1] // ggml_type.type_size
    packed = raw.reshape(raw.shape[0], blocks, ggml_type.type_size).transpose(1, 2, 0)
    pieces: list[tuple[Any, ...]]
    if transpose:
        weights = target.reshape(blocks, ggml_type.block_size, -1)
        step = max(1, TILE // (ggml_type.block_size * raw.shape[0]))
        pieces = [(slice(at, at + step),) for at in range(0, blocks, step)]
    else:
        weights = target.reshape(-1, blocks, ggml_type.block_size).transpose(1, 2, 0)
        step = max(1, TILE // (ggml_type.block_size * blocks))
        pieces = [(..., slice(at, at + step)) for at in range(0, raw.shape[0], step)]
    with np.errstate(all="ignore"):  # a scale may be inf or NaN in the file: so are its weights, then
        for piece in pieces:
            source = np.ascontiguousarray(packed[piece]) if transpose else packed[piece]
            into = weights[piece]
            floats = into if into.dtype == np.float32 else np.empty_like(into, np.float32)
            ggml_type.dequantize(source, floats)  # type: ignore[misc]
            if floats is not into:
                np.copyto(into, floats, casting="unsafe")
