"""SwapSpace: which blocks of preempted groups are kept in host memory (paper, section 4.5).

Blocks that the rows of a group share leave once and come back shared:

    tables   [ 7 3 9 ]  [ 7 3 5 ] --out--> blocks [3 5 7 9] entries [2 0 3] [2 0 1] --in--> [ 4 8 2 ]  [ 4 8 6 ]

Only the ledger lives here; the contents are the runner's business (`Swapped.contents`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jpaged.memory.block_manager import BlockManager


@dataclasses.dataclass(eq=False, slots=True)
class Swapped:
    """The tables of some rows after their blocks have left the pool."""

    blocks: np.ndarray  # int32 [k]: distinct blocks, where they were in the pool
    firsts: list[int]  # of each row: null blocks that its table begins with
    entries: list[np.ndarray]  # of each row, int32 [n]: the rest of its table as indices into `blocks`
    positions: list[int]
    """Of each row: tokens whose K and V have been computed."""
    roots: list[bytes]
    digests: list[list[bytes]]
    contents: Any = None
    """What the runner keeps of the blocks in host memory; None until the step that moves them is launched."""


class SwapSpace:
    """Room for blocks in host memory.

    Args:
      blocks: whose rows are swapped.
      capacity: blocks that the host has room for.
    """

    def __init__(self, blocks: BlockManager, capacity: int) -> None:
        self.capacity = capacity
        self.num_used = 0
        self._blocks = blocks

    def try_out(self, rows: Sequence[int], positions: Sequence[int]) -> Swapped | None:
        """Closes rows whose first `positions` tokens have been computed; None (and nothing changed) without room.

        Blocks are free for others at once: the runner copies them out before the next step overwrites them.
        """
        manager = self._blocks
        firsts = manager.firsts[list(rows)].tolist()
        spans = zip(rows, firsts, positions, strict=True)
        tables = [manager.tables[row, first : manager.blocks_for(position)] for row, first, position in spans]
        blocks, entries = np.unique(np.concatenate(tables), return_inverse=True)
        if self.num_used + len(blocks) > self.capacity:
            return None
        self.num_used += len(blocks)
        swapped = Swapped(
            blocks=blocks,
            firsts=firsts,
            entries=np.split(entries, np.cumsum([len(t) for t in tables])[:-1]),
            positions=list(positions),
            roots=[manager.roots[row] for row in rows],
            digests=[manager.digests[row] for row in rows],
        )
        for row in rows:
            manager.close(row)
        return swapped

    def blocks_needed(self, swapped: Swapped, which: Sequence[int]) -> int:
        """Blocks that the rows `which` of a swapped group take in the pool."""
        return len(np.unique(np.concatenate([swapped.entries[i] for i in which])))

    def back_in(self, swapped: Swapped, which: Sequence[int], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Gives `rows` the tables of the swapped rows `which`, shared as they were. The caller checked num_free.

        Returns: (indices into `swapped.blocks`, the blocks of the pool that they go to), int32 [n] each.
        """
        manager, allocator = self._blocks, self._blocks.allocator
        indices, inverse = np.unique(np.concatenate([swapped.entries[i] for i in which]), return_inverse=True)
        blocks = np.array(allocator.allocate(len(indices)), np.int32)
        start = 0
        for i, row in zip(which, rows, strict=True):
            table = blocks[inverse[start : start + len(swapped.entries[i])]]
            start += len(table)
            allocator.acquire(table)
            first = swapped.firsts[i]
            manager.lay(row, np.pad(table, (first, 0)), swapped.roots[i], swapped.digests[i], first)
        allocator.release(blocks)
        self.forget(swapped)
        return indices.astype(np.int32), blocks

    def forget(self, swapped: Swapped) -> None:
        """Gives up the room of a swapped group."""
        self.num_used -= len(swapped.blocks)
