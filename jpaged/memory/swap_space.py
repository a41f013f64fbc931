"""SwapSpace: which blocks of preempted groups are kept in host memory (paper, section 4.5).

Blocks that the rows of a group share leave once and come back shared:

    tables   [ 7 3 9 ]  [ 7 3 5 ] --out--> blocks [3 5 7 9] entries [3 1 4] [3 1 2] --in--> [ 4 8 2 ]  [ 4 8 6 ]

Only the ledger lives here; the contents are the runner's business (`Swapped.contents`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK
from jpaged.memory.block_manager import BlockManager
from jpaged.memory.row_tables import held

_NULL = np.array([NULL_BLOCK], np.int32)


@dataclasses.dataclass(eq=False, slots=True)
class Swapped:
    """The tables of some rows after their blocks have left the pool."""

    blocks: np.ndarray  # int32 [k]: distinct blocks, where they were in the pool
    entries: list[np.ndarray]  # of each row, int [n]: its table as places in `blocks`, from 1 on; 0: the null block
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
        spans = zip(rows, positions, strict=True)
        tables = [manager.tables[row, : manager.blocks_for(position)] for row, position in spans]
        blocks, entries = np.unique(np.concatenate([_NULL, *tables]), return_inverse=True)
        blocks, entries = blocks[1:], entries[1:]
        if self.num_used + len(blocks) > self.capacity:
            return None
        self.num_used += len(blocks)
        swapped = Swapped(
            blocks=blocks,
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
        return len(np.unique(held(np.concatenate([swapped.entries[i] for i in which]))))

    def back_in(self, swapped: Swapped, which: Sequence[int], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Gives `rows` the tables of the swapped rows `which`, shared as they were. The caller checked num_free.

        Returns: (indices into `swapped.blocks`, the blocks of the pool that they go to), int32 [n] each.
        """
        manager, allocator = self._blocks, self._blocks.allocator
        places = np.unique(held(np.concatenate([swapped.entries[i] for i in which])))
        blocks = np.array(allocator.allocate(len(places)), np.int32)
        moved = np.zeros(1 + len(swapped.blocks), np.int32)  # place -> block of the pool
        moved[places] = blocks
        for i, row in zip(which, rows, strict=True):
            table = moved[swapped.entries[i]]
            allocator.acquire(held(table))
            manager.lay(row, table, swapped.roots[i], swapped.digests[i])
        allocator.release(blocks)
        self.forget(swapped)
        return (places - 1).astype(np.int32), blocks

    def forget(self, swapped: Swapped) -> None:
        """Gives up the room of a swapped group."""
        self.num_used -= len(swapped.blocks)
