"""Moves of whole blocks, in all layers at once: one function per operation, whatever platform implements it.

A pool is a tuple with one array [num_blocks, ...] a layer. Block 0 is the null block: padding copies it onto itself.
"""

import jax

from pallas_kernels.block_copy import xla

Pool = tuple[jax.Array, ...]


def copy_blocks(pool: Pool, sources: jax.Array, destinations: jax.Array, count: jax.Array) -> Pool:
    """Copies blocks within the pool (copy-on-write; paper, section 4.4).

    Args:
      pool: updated in place where it is donated.
      sources, destinations: int32 [N]. No block is both, and destinations are distinct.
      count: int32 []: how many of the N are real. None costs next to nothing.

    Returns: the pool.
    """
    return xla.copy_blocks(pool, sources, destinations, count)


def gather_blocks(pool: Pool, blocks: jax.Array) -> Pool:
    """The contents of some blocks, for swapping them out: one array [n, ...] a layer.

    Args:
      blocks: int32 [n]; 0 where padded.
    """
    return xla.gather_blocks(pool, blocks)


def scatter_blocks(pool: Pool, blocks: jax.Array, contents: Pool) -> Pool:
    """Writes contents into blocks, for swapping them in.

    Args:
      pool: updated in place where it is donated.
      blocks: int32 [n], distinct but for padding with 0.
      contents: one array [n, ...] a layer, as `gather_blocks` returns them.
    """
    return xla.scatter_blocks(pool, blocks, contents)
