"""Moves of whole blocks, in all layers at once: one function per operation, whatever platform implements it.

A pool is a tuple with one array [num_blocks, ...] a layer, or any other tree of such arrays (quantised pools have
scales). Block 0 is the null block: padding copies it onto itself.

Implementations: "xla" runs everywhere; "triton" on NVIDIA GPUs, where it is one launch for all layers. They are chosen
as those of paged attention are. On several devices Triton kernels are for `shard_map`: XLA cannot divide them.
"""

from typing import Any

import jax

from pallas_kernels import dispatch

Pool = tuple[Any, ...]


def copy_blocks(
    pool: Pool, sources: jax.Array, destinations: jax.Array, count: jax.Array, *, implementation: str | None = None
) -> Pool:
    """Copies blocks within the pool (copy-on-write; paper, section 4.4).

    Args:
      pool: updated in place where it is donated.
      sources, destinations: int32 [N]. No block is both, and destinations are distinct.
      count: int32 []: how many of the N are real. None costs next to nothing.
      implementation: "auto", "xla" or "triton"; None: the environment's JPAGED_KERNELS, else "auto".

    Returns: the pool.

    Raises:
      ValueError: the implementation asked for is unknown or does not support this pool.
    """
    return dispatch.implementation(__package__, "copy_blocks", implementation, pool)(pool, sources, destinations, count)


def gather_blocks(pool: Pool, blocks: jax.Array, *, implementation: str | None = None) -> Pool:
    """The contents of some blocks, for swapping them out: one array [n, ...] a layer.

    Args:
      blocks: int32 [n]; 0 where padded.
      implementation: as in `copy_blocks`.
    """
    return dispatch.implementation(__package__, "gather_blocks", implementation, pool)(pool, blocks)


def scatter_blocks(pool: Pool, blocks: jax.Array, contents: Pool, *, implementation: str | None = None) -> Pool:
    """Writes contents into blocks, for swapping them in.

    Args:
      pool: updated in place where it is donated.
      blocks: int32 [n], distinct but for padding with 0.
      contents: one array [n, ...] a layer, as `gather_blocks` returns them.
      implementation: as in `copy_blocks`.
    """
    return dispatch.implementation(__package__, "scatter_blocks", implementation, pool)(pool, blocks, contents)
