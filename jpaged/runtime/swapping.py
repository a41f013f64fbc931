"""Swapping: blocks of preempted groups on their way to host memory and back (paper, section 4.5).

Blocks move in chunks of a few fixed sizes, so that a handful of compiled programs serve any number of blocks.
"""

import dataclasses
import functools
import logging
import time

import jax
import numpy as np
from jax.sharding import Sharding

from jpaged import logs
from pallas_kernels.block_copy import gather_blocks, scatter_blocks
from pallas_kernels.paged_attention import KV, pool_values

log = logging.getLogger("jpaged.swapping")

CHUNKS = (64, 8)
"""Blocks that move in one call; the rest is padded to the smallest that holds it."""

Pool = tuple[KV, ...]


@dataclasses.dataclass
class Traffic:
    """What has been moved in one direction."""

    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, blocks: int, num_bytes: int, seconds: float) -> None:
        self.blocks += blocks
        self.bytes += num_bytes
        self.seconds += seconds


class Swapper:
    """Copies blocks between the pool and pinned host memory, and measures it.

    A swap is waited for: it is rare, and its time is worth knowing.

    Args:
      block_bytes: of one block, all layers.
      sharding: of every layer's pool. In host memory, blocks lie by device as they do in the pool.
    """

    def __init__(self, block_bytes: int, sharding: Sharding) -> None:
        self.block_bytes = block_bytes
        self.out, self.back = Traffic(), Traffic()
        self._here = sharding
        # XLA divides its own moves over several devices; a kernel it would give the whole pool.
        implementation = "xla" if len(sharding.device_set) > 1 else None
        gather = functools.partial(gather_blocks, implementation=implementation)
        scatter = functools.partial(scatter_blocks, implementation=implementation)
        self._gather = jax.jit(gather, out_shardings=sharding.with_memory_kind("pinned_host"))
        self._scatter = jax.jit(scatter, donate_argnums=0, out_shardings=sharding)

    def swap_out(self, pool: Pool, blocks: np.ndarray) -> list[Pool]:
        """The contents of blocks (int32 [n]) in host memory, in chunks."""
        jax.block_until_ready(pool)
        start = time.perf_counter()
        contents = [self._gather(pool, chunk) for chunk in _chunks(blocks)]
        jax.block_until_ready(contents)
        self._count("swap_out", self.out, len(blocks), time.perf_counter() - start)
        return contents

    def swap_in(self, pool: Pool, contents: list[Pool], indices: np.ndarray, blocks: np.ndarray) -> Pool:
        """Writes what was swapped out as number indices[i] into blocks[i] (int32 [n] each); the pool is donated."""
        jax.block_until_ready(pool)
        start = time.perf_counter()
        sizes = [len(pool_values(chunk[0])) for chunk in contents]
        targets = np.zeros(sum(sizes), np.int32)  # what is not wanted back goes to the null block
        targets[indices] = blocks
        for chunk, target in zip(contents, np.split(targets, np.cumsum(sizes)[:-1]), strict=True):
            pool = self._scatter(pool, target, jax.device_put(chunk, self._here))
        jax.block_until_ready(pool)
        self._count("swap_in", self.back, len(blocks), time.perf_counter() - start)
        return pool

    def read(self, pool: Pool, blocks: np.ndarray) -> list[np.ndarray]:
        """The contents of blocks (int32 [n]), for each array of the pool [n, ...]."""
        chunks = [jax.tree.leaves(self._gather(pool, chunk)) for chunk in _chunks(blocks)]
        return [np.concatenate([np.asarray(c) for c in parts])[: len(blocks)] for parts in zip(*chunks, strict=True)]

    def write(self, pool: Pool, contents: list[np.ndarray], blocks: np.ndarray) -> Pool:
        """Writes what `read` returned into blocks (int32 [n]); the pool is donated."""
        start, treedef = 0, jax.tree.structure(pool)
        for chunk in _chunks(blocks):
            parts = [array[start : start + len(chunk)] for array in contents]
            missing = len(chunk) - len(parts[0])  # padding goes to the null block
            parts = [np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) for part in parts]
            pool = self._scatter(pool, chunk, jax.device_put(jax.tree.unflatten(treedef, parts), self._here))
            start += len(chunk)
        return pool

    @staticmethod
    def fits(pool: Pool, contents: list[np.ndarray]) -> bool:
        """Whether `read` of such a pool could have returned this."""
        kinds = [(array.shape[1:], array.dtype) for array in contents]
        return kinds == [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(pool)]

    def _count(self, event: str, traffic: Traffic, blocks: int, seconds: float) -> None:
        traffic.add(blocks, blocks * self.block_bytes, seconds)
        logs.report(log, event, blocks=blocks, bytes=blocks * self.block_bytes, seconds=round(seconds, 6))


def _chunks(blocks: np.ndarray) -> list[np.ndarray]:
    """Pieces of the sizes that are compiled; only the last is padded, with the null block."""
    pieces = np.split(blocks, range(CHUNKS[0], len(blocks), CHUNKS[0]))
    size = min(c for c in CHUNKS if c >= len(pieces[-1]))
    pieces[-1] = np.pad(pieces[-1], (0, size - len(pieces[-1])))
    return pieces
