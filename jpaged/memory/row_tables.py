"""RowTables: the block table of every row, grown on demand, shared and copied on write (paper, sections 4.2 to 4.4).

    tables[row]   logical block -> physical block      [ 7 | 3 | 12 | 0 | 0 ... ]   0 = null block: no entry
    counts[row]   entries in use                         3
    firsts[row]   entries before these are null again    0   (they lie behind the sliding window)

A row is a running sequence's place in the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator

_ENDLESS = 1 << 30  # a window that nothing ever leaves


class Writes(NamedTuple):
    """Where the next tokens of some rows go, and what has to be allocated for that."""

    rows: np.ndarray  # int32 [d]
    indices: np.ndarray  # int32 [d]: logical block
    fresh: np.ndarray  # bool [d]: that block is not there yet
    shared: np.ndarray  # bool [d]: it is there, and others hold it too
    num_blocks: int


class RowTables:
    """Shares, grows, copies and closes the tables of the rows.

    Args:
      allocator: where blocks come from.
      block_size: tokens a block.
      max_rows: rows of the batch.
      max_blocks_per_row: width of a block table.
      window: no layer attends to more than so many tokens, the query's own included; blocks behind are given back.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_size: int,
        max_rows: int,
        max_blocks_per_row: int,
        *,
        window: int | None = None,
    ) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.window = window
        self.tables = np.full((max_rows, max_blocks_per_row), NULL_BLOCK, np.int32)
        self.counts = np.zeros(max_rows, np.int32)
        self.firsts = np.zeros(max_rows, np.int32)
        self.num_copies = 0
        """Blocks copied on write, ever."""
        self.version = 0
        """Changes whenever rows may have begun, or ceased, to share blocks."""
        # The chain of each row: digests[row][i] names its blocks 0..i; it may lag behind the table.
        self.digests: list[list[bytes]] = [[] for _ in range(max_rows)]
        self.roots: list[bytes] = [b""] * max_rows

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def behind_window(self, position):
        """Leading blocks that a token at `position` (an int, or int32 [n]), and those after it, do not attend to."""
        return np.maximum(position + 1 - (self.window or _ENDLESS), 0) // self.block_size

    @property
    def num_free(self) -> int:
        return self.allocator.num_free

    @property
    def num_used(self) -> int:
        """Blocks that some table refers to."""
        return self.allocator.num_usable - self.allocator.num_free

    def fork(self, source: int, row: int) -> None:
        """Lets a row without blocks share all of another's; whoever writes to one gets a copy (section 4.4)."""
        blocks, first = self.tables[source, : self.counts[source]], int(self.firsts[source])
        self.allocator.acquire(blocks[first:])
        self.lay(row, blocks, self.roots[source], self.digests[source].copy(), first)

    def slide(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Gives back the blocks behind the window of rows whose next tokens to compute are at `positions` (int32 [n]).

        Steps run in order: who gets such a block writes to it after the last step that reads it. One block more than
        is needed stays, so that a table that is cut back to its full blocks can go on.
        """
        if self.window is None:
            return
        firsts = np.minimum(self.behind_window(positions - self.block_size), self.counts[rows])
        for i in np.flatnonzero(firsts > self.firsts[rows]).tolist():
            row, first = int(rows[i]), int(firsts[i])
            self.allocator.release(self.tables[row, self.firsts[row] : first])
            self.tables[row, :first] = NULL_BLOCK
            self.firsts[row] = first
            self.version += 1

    def close(self, row: int) -> None:
        """Releases a row's blocks, tail first, so that shared beginnings are evicted last."""
        self.allocator.release(self.tables[row, self.firsts[row] : self.counts[row]][::-1])
        self.clear(row)

    def lay(
        self, row: int, blocks: Sequence[int] | np.ndarray, root: bytes, digests: list[bytes], first: int = 0
    ) -> None:
        """Gives an empty row a table whose references are there already."""
        self.tables[row, : len(blocks)] = blocks
        self.counts[row], self.firsts[row] = len(blocks), first
        self.roots[row], self.digests[row] = root, digests
        self.version += 1

    def clear(self, row: int) -> None:
        """Empties a row's table; its references are the caller's now."""
        self.tables[row] = NULL_BLOCK
        self.counts[row] = self.firsts[row] = 0
        self.digests[row] = []
        self.version += 1

    # -------------------------------------------------------------------------------------------------- writes

    def writes(self, rows: np.ndarray, positions: np.ndarray) -> Writes:
        """What it takes to write one token of each row (int32 [d]) at its position (int32 [d])."""
        indices = positions // self.block_size
        fresh = indices == self.counts[rows]
        blocks = self.tables[rows, indices]
        refs = self.allocator.refs
        shared = refs[blocks] > 1
        copies = 0
        if shared.any():
            # Of r sharers that all write, the last one writes in place.
            distinct, writers = np.unique(blocks[shared], return_counts=True)
            copies = int(np.minimum(writers, refs[distinct] - 1).sum())
        return Writes(rows, indices, fresh, shared, int(fresh.sum()) + copies)

    def make_writable(self, writes: Writes) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Appends the fresh blocks, and gives every sharer but the last a copy of its own. The caller checked num_free.

        Returns: (block that is new in each row's table, or 0, int32 [d]; (source, destination) blocks to be copied
        before anything is written).
        """
        new = np.zeros(len(writes.rows), np.int32)
        copies: list[tuple[int, int]] = []
        fresh = np.flatnonzero(writes.fresh)
        if len(fresh):
            new[fresh] = self.allocator.allocate(len(fresh))
            rows = writes.rows[fresh]
            self.tables[rows, writes.indices[fresh]] = new[fresh]
            self.counts[rows] += 1
        for i in np.flatnonzero(writes.shared).tolist():
            copy = self.own(int(writes.rows[i]), int(writes.indices[i]))
            if copy is not None:
                new[i] = copy[1]
                copies.append(copy)
        return new, copies

    def grow(self, row: int, position: int, spare: int) -> int:
        """Appends blocks up to the one of `position` as long as `spare` stay free; returns the positions that a row
        then has blocks for."""
        while self.counts[row] * self.block_size <= position and self.num_free > spare:
            [self.tables[row, self.counts[row]]] = self.allocator.allocate(1)
            self.counts[row] += 1
        return int(self.counts[row]) * self.block_size

    def own(self, row: int, index: int) -> tuple[int, int] | None:
        """Makes a block of a row its own; returns (source, destination) if that took a copy."""
        shared = int(self.tables[row, index])
        if self.allocator.refs[shared] == 1:
            return None
        [block] = self.allocator.allocate(1)
        self.allocator.release([shared])
        self.tables[row, index] = block
        self.num_copies += 1
        self.version += 1
        return shared, block

    def entries(self) -> list[int]:
        """Every entry of every row's table.

        Raises:
          RuntimeError: a table and its count do not agree.
        """
        spans = list(enumerate(zip(self.firsts.tolist(), self.counts.tolist(), strict=True)))
        for row, (first, count) in spans:
            if self.tables[row, count:].any():
                raise RuntimeError(f"row {row} has table entries beyond its count")
            if self.tables[row, :first].any():
                raise RuntimeError(f"row {row} has table entries behind its window")
        return [b for row, (first, count) in spans for b in self.tables[row, first:count].tolist()]
