"""RowTables: the block table of every row, grown on demand, shared and copied on write (paper, sections 4.2 to 4.4).

    tables[row]   logical block -> physical blocks     [ 7 | 3 | 12 | 0 | 0 ... ]   0 = null block: no entry
    counts[row]   entries in use                         3
    firsts[row]   entries before these are null again    0   (they lie behind the sliding window)
    ahead[row]    entries from there on are null still   -   (of a long prompt that is computed in chunks)

A row is a running sequence's place in the batch.

Layers with different windows need different blocks, so a model's layers come in G groups (`LayerGroups`), and a logical
block is G entries of the table side by side, one physical block for each group:

    [ 7 3 | 9 4 | 8 6 ]   two groups, three logical blocks
    [ 7 0 | 9 4 | 8 6 ]   the window of the second has left one
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator

ENDLESS = 1 << 29  # tokens: a window that nothing ever leaves

Entries = Sequence[int] | np.ndarray
"""Of a table: G for each logical block."""


def held(entries: np.ndarray) -> np.ndarray:
    """The blocks of table entries (int32 [n]): what is not null."""
    return entries[entries != NULL_BLOCK]


class Writes(NamedTuple):
    """Where the next tokens of some rows go, and what has to be allocated for that."""

    rows: np.ndarray  # int32 [d * G]: each row once for each layer group
    indices: np.ndarray  # int32 [d * G]: table entry
    fresh: np.ndarray  # bool [d * G]: that block is not there yet
    shared: np.ndarray  # bool [d * G]: it is there, and others hold it too
    num_blocks: int


class RowTables:
    """Shares, grows, copies and closes the tables of the rows.

    Args:
      allocator: where blocks come from.
      block_size: tokens a block.
      max_rows: rows of the batch.
      max_blocks_per_row: logical blocks of the longest sequence.
      windows: of each layer group: it attends to no more than so many tokens, the query's own included, and blocks
        behind them are given back. None: to all.
      max_chunk: most tokens of a row that a step computes. A row gets blocks for all its known tokens, but of layer
        groups with a window only for the next so many. None: always for all.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_size: int,
        max_rows: int,
        max_blocks_per_row: int,
        *,
        windows: Sequence[int | None] = (None,),
        max_chunk: int | None = None,
    ) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.windows = tuple(windows)
        self.num_groups = len(windows)
        """Layer groups, G: table entries of a logical block."""
        self.tables = np.full((max_rows, max_blocks_per_row * self.num_groups), NULL_BLOCK, np.int32)
        self.by_group = self.tables.reshape(max_rows, max_blocks_per_row, self.num_groups)
        """The same entries (a view): row, logical block, layer group."""
        self.counts = np.zeros(max_rows, np.int32)
        self.firsts = np.zeros((max_rows, self.num_groups), np.int32)  # in logical blocks
        self.ahead: dict[int, int] = {}
        """Rows that lack blocks for tokens further on: the logical blocks for which groups with a window have some."""
        self._groups = np.arange(self.num_groups, dtype=np.int32)
        self._slides = np.array([window is not None for window in windows])
        self._num_sliding = int(self._slides.sum())
        self.max_chunk = max_chunk or ENDLESS
        self._seen = np.array([window or ENDLESS for window in windows], np.int32)  # tokens
        self.num_copies = 0
        """Blocks copied on write, ever."""
        self.version = 0
        """Changes whenever rows may have begun, or ceased, to share blocks of the first layer group."""
        # The chain of each row: digests[row][i] names its blocks 0..i; it may lag behind the table.
        self.digests: list[list[bytes]] = [[] for _ in range(max_rows)]
        self.roots: list[bytes] = [b""] * max_rows

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens, those of all layer groups."""
        return -(-num_tokens // self.block_size) * self.num_groups

    def behind_window(self, position: Any) -> np.ndarray:
        """Leading blocks of each layer group that a token at `position` (an int, or int32 [n]), and those after it, do
        not attend to: int32 [G], or [n, G]."""
        return np.maximum(np.asarray(position)[..., None] + 1 - self._seen, 0) // self.block_size

    def leading_nulls(self, entries: Entries) -> np.ndarray:
        """Of each layer group, the logical blocks that its window has left: int [G], of a table's entries."""
        nulls = np.asarray(entries, np.int32).reshape(-1, self.num_groups) == NULL_BLOCK
        return np.logical_and.accumulate(nulls).sum(0)

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a row holds at most on its way to so many tokens, if it is opened alone."""
        kept = (self._seen + self.max_chunk) // self.block_size + 3  # a partial block at each end, and one to spare
        return int(np.minimum(-(-num_tokens // self.block_size), kept).sum())

    @property
    def num_free(self) -> int:
        return self.allocator.num_free

    @property
    def num_used(self) -> int:
        """Blocks that some table refers to."""
        return self.allocator.num_usable - self.allocator.num_free

    def fork(self, source: int, row: int) -> None:
        """Lets a row without blocks share all of another's; whoever writes to one gets a copy (section 4.4)."""
        entries = self.tables[source, : self.counts[source]]
        self.allocator.acquire(held(entries))
        self.lay(row, entries, self.roots[source], self.digests[source].copy())

    def slide(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Gives back the blocks behind the windows of rows whose next tokens to compute are at `positions` (int32 [n]).

        Steps run in order: who gets such a block writes to it after the last step that reads it. One block more than
        is needed stays, so that a table that is cut back to its full blocks can go on.
        """
        if not self._num_sliding:
            return
        ends = self.counts[rows, None] // self.num_groups
        firsts = np.minimum(self.behind_window(positions - self.block_size), ends)  # [n, G]
        for i, group in np.argwhere(firsts > self.firsts[rows]).tolist():
            row, first = int(rows[i]), int(firsts[i, group])
            left = self.by_group[row, self.firsts[row, group] : first, group]
            self.allocator.release(left)
            left[:] = NULL_BLOCK
            self.firsts[row, group] = first
            self.version += group == 0

    def close(self, row: int) -> None:
        """Releases a row's blocks, tail first, so that shared beginnings are evicted last."""
        self.allocator.release(held(self.tables[row, : self.counts[row]][::-1]))
        self.clear(row)

    def lay(self, row: int, entries: Entries, root: bytes, digests: list[bytes], position: int = ENDLESS) -> None:
        """Gives an empty row a table whose references are there already; `position`: what `needed` was asked for."""
        self.tables[row, : len(entries)] = entries
        self.counts[row], self.firsts[row] = len(entries), self.leading_nulls(entries)
        self.roots[row], self.digests[row] = root, digests
        self.version += 1
        if self._num_sliding:
            self._note(row, self._reach(position))

    # ---------------------------------------------------------------------------------------- prompts in chunks

    def needed(self, num_held: int, num_tokens: int, position: int) -> np.ndarray:
        """Which entries a row needs blocks for at once, after its first `num_held` logical blocks and up to those of
        `num_tokens` tokens, if its next step begins at `position`: bool [logical blocks, G]."""
        needed = np.ones((max(-(-num_tokens // self.block_size) - num_held, 0), self.num_groups), bool)
        needed[max(self._reach(position) - num_held, 0) :, self._slides] = False
        return needed

    def supply(self, needed: np.ndarray) -> list[int]:
        """New table entries with the blocks that are needed. The caller checked num_free."""
        entries = np.zeros(needed.shape, np.int32)
        entries[needed] = self.allocator.allocate(int(needed.sum()))
        return entries.ravel().tolist()

    def _reach(self, position: int) -> int:
        """Logical blocks up to the end of a step that begins at `position`."""
        return -(-(position + self.max_chunk) // self.block_size)

    def extend(self, row: int, position: int) -> bool:
        """Gives a row blocks for the step that begins at `position`, or as many as are free; whether it got any."""
        if row not in self.ahead:
            return False
        first, count, groups = self.ahead[row], int(self.counts[row]) // self.num_groups, self._num_sliding
        last = min(self._reach(position), count, first + self.num_free // groups)
        if last <= first:
            return False
        blocks = np.array(self.allocator.allocate((last - first) * groups), np.int32)
        self.by_group[row, first:last][:, self._slides] = blocks.reshape(-1, groups)
        self._note(row, last)
        return True

    def _note(self, row: int, last: int) -> None:
        """Up to which logical block all groups of a row have blocks."""
        if last * self.num_groups < self.counts[row]:
            self.ahead[row] = last
        else:
            self.ahead.pop(row, None)

    def covered(self, row: int) -> int:
        """Tokens that a row has blocks for in all layer groups."""
        return self.ahead.get(row, int(self.counts[row]) // self.num_groups) * self.block_size

    def lacking(self, row: int, position: int) -> int:
        """Blocks without which a row cannot compute its token at `position`."""
        return 0 if row not in self.ahead or position < self.covered(row) else self._num_sliding

    def clear(self, row: int) -> None:
        """Empties a row's table; its references are the caller's now."""
        self.tables[row] = NULL_BLOCK
        self.counts[row], self.firsts[row] = 0, 0
        self.digests[row] = []
        self.ahead.pop(row, None)
        self.version += 1

    # -------------------------------------------------------------------------------------------------- writes

    def writes(self, rows: np.ndarray, positions: np.ndarray) -> Writes:
        """What it takes to write one token of each row (int32 [d]) at its position (int32 [d])."""
        indices = positions // self.block_size
        if self.num_groups > 1:
            indices = (indices[:, None] * self.num_groups + self._groups).ravel()
            rows = rows.repeat(self.num_groups)
        fresh = indices >= self.counts[rows]
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

        Returns: (blocks that are new in each row's table, or 0, int32 [d, G]; (source, destination) blocks to be copied
        before anything is written).
        """
        new = np.zeros(len(writes.rows), np.int32)
        copies: list[tuple[int, int]] = []
        fresh = np.flatnonzero(writes.fresh)
        if len(fresh):
            new[fresh] = self.allocator.allocate(len(fresh))
            rows, indices = writes.rows[fresh], writes.indices[fresh]
            self.tables[rows, indices] = new[fresh]
            self.counts[rows] = indices + 1  # a row's last entry comes last, and stays
        for i in np.flatnonzero(writes.shared).tolist():
            copy = self.own(int(writes.rows[i]), int(writes.indices[i]))
            if copy is not None:
                new[i] = copy[1]
                copies.append(copy)
        return new.reshape(-1, self.num_groups), copies

    def grow(self, row: int, position: int, spare: int) -> int:
        """Appends blocks up to those of `position` as long as `spare` stay free; returns the positions that a row
        then has blocks for."""
        groups = self.num_groups
        while self.counts[row] < self.blocks_for(position + 1) and self.num_free - spare >= groups:
            count = self.counts[row]
            self.tables[row, count : count + groups] = self.allocator.allocate(groups)
            self.counts[row] += groups
        return int(self.counts[row]) // groups * self.block_size

    def own(self, row: int, index: int) -> tuple[int, int] | None:
        """Makes the block of a row's table entry its own; returns (source, destination) if that took a copy."""
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
        """The blocks of every row's table, repeats included.

        Raises:
          RuntimeError: a table, its count, and where it begins do not agree.
        """
        blocks: list[int] = []
        for row, count in enumerate(self.counts.tolist()):
            if self.tables[row, count:].any():
                raise RuntimeError(f"row {row} has table entries beyond its count")
            blocks += self.checked(self.tables[row, :count], self.firsts[row], self.ahead.get(row, count))
        return blocks

    def checked(self, entries: np.ndarray, firsts: np.ndarray, ahead: int) -> list[int]:
        """The blocks of a table that begins with so many null blocks in each layer group, int [G], and has others only
        from the logical block `ahead` on, in groups with a window.

        Raises:
          RuntimeError: it has others.
        """
        table = entries.reshape(-1, self.num_groups)
        index = np.arange(len(table))[:, None]
        nulls = (index < firsts) | (index >= ahead) & self._slides
        if table[nulls].any():
            raise RuntimeError("a table has entries behind its window, or far ahead of it")
        if (table[~nulls] == NULL_BLOCK).any():
            raise RuntimeError("a table entry in use points to the null block")
        return table[~nulls].tolist()
