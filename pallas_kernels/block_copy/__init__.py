"""Moves of whole blocks: copy-on-write inside a step, and gather and scatter for swapping."""

from pallas_kernels.block_copy.api import copy_blocks, gather_blocks, scatter_blocks

__all__ = ["copy_blocks", "gather_blocks", "scatter_blocks"]
