"""ParkedTables: block tables without a row, which sessions hold between their runs. They give way to requests."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jpaged.memory.row_tables import RowTables


@dataclasses.dataclass(eq=False, slots=True)
class Table:
    """A block table without a row: one reference an entry, as in any table."""

    blocks: np.ndarray  # int32 [n]; the first `first` are null
    num_computed: int
    """Tokens whose K and V the blocks hold."""
    root: bytes
    digests: list[bytes]
    first: int = 0
    pinned: bool = False
    """Never reclaimed."""


class ParkedTables:
    """The parked tables, the longest parked first.

    Args:
      rows: whose tables are parked.
    """

    def __init__(self, rows: RowTables) -> None:
        self._rows = rows
        self._tables: dict[Table, None] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables)

    def __contains__(self, table: Table) -> bool:
        return table in self._tables

    def park(self, row: int, num_computed: int) -> Table:
        """Takes a row's table off the row, with the blocks of its first `num_computed` tokens."""
        rows = self._rows
        blocks, first = rows.tables[row, : rows.counts[row]].copy(), int(rows.firsts[row])
        table = Table(blocks, num_computed, rows.roots[row], rows.digests[row], first)
        rows.clear(row)
        self._tables[table] = None
        self.truncate(table, num_computed)
        return table

    def can_resume(self, table: Table, num_tokens: int) -> bool:
        """Whether a parked table still has what the next of `num_tokens` tokens attends to."""
        return table.first <= self._rows.behind_window(min(table.num_computed, num_tokens - 1))

    def try_unpark(
        self, table: Table, row: int, num_tokens: int, reserve: int = 0
    ) -> tuple[int, list[tuple[int, int]]] | None:
        """Gives a row a parked table, and the blocks that `num_tokens` tokens need besides.

        The last token is computed again if it was computed, for its logits. The caller checked `can_resume`.

        Returns: (tokens that need not be computed, (source, destination) blocks to be copied), or None (and nothing
        changed) if blocks are short.
        """
        rows, allocator = self._rows, self._rows.allocator
        start = min(table.num_computed, num_tokens - 1)
        index, count = start // rows.block_size, len(table.blocks)
        shared = index < count and allocator.refs[table.blocks[index]] > 1
        new = rows.blocks_for(num_tokens) - count
        if new + shared + reserve > allocator.num_free:
            return None
        del self._tables[table]
        blocks = [*table.blocks.tolist(), *allocator.allocate(new)]
        rows.lay(row, blocks, table.root, table.digests, table.first)
        copy = rows.own(row, index) if shared else None
        if len(table.digests) <= index < count and not allocator.is_writable(rows.tables[row, index]):
            allocator.forget(int(rows.tables[row, index]))  # it was full once: what comes now is something else
        return start, [copy] if copy else []

    def fork(self, table: Table) -> Table:
        """Another table over the same blocks."""
        self._rows.allocator.acquire(table.blocks[table.first :])
        copy = dataclasses.replace(table, digests=table.digests.copy(), pinned=False)
        self._tables[copy] = None
        return copy

    def truncate(self, table: Table, num_computed: int) -> None:
        """Keeps the first `num_computed` tokens' K and V of a parked table; nothing if the window has left them."""
        rows = self._rows
        if table.first > rows.behind_window(min(table.num_computed, num_computed)):
            num_computed = 0
        kept = rows.blocks_for(num_computed)
        rows.allocator.release(table.blocks[max(kept, table.first) :][::-1])
        table.first = min(table.first, kept)
        table.blocks, table.num_computed = table.blocks[:kept], min(table.num_computed, num_computed)
        del table.digests[num_computed // rows.block_size :]

    def release(self, table: Table) -> None:
        """Gives a parked table's blocks back; nothing is left of it but the cache's memory of full blocks."""
        if table in self._tables:
            self.truncate(table, 0)
            del self._tables[table]

    def reclaim(self, wanted: int) -> bool:
        """Releases parked tables, the longest parked first, until `wanted` blocks are free or all left are pinned.

        Returns: whether any was released.
        """
        before = len(self._tables)
        for table in list(self._tables):
            if self._rows.num_free >= wanted:
                break
            if not table.pinned:
                self.release(table)
        return len(self._tables) < before

    @property
    def num_pinned(self) -> int:
        """Blocks that pinned tables keep from everybody else."""
        return len({block for table in self._tables if table.pinned for block in table.blocks[table.first :].tolist()})

    def entries(self) -> list[int]:
        """Every entry of every parked table.

        Raises:
          RuntimeError: a table has entries behind its window.
        """
        if any(table.blocks[: table.first].any() for table in self._tables):
            raise RuntimeError("a parked table has entries behind its window")
        return [block for table in self._tables for block in table.blocks[table.first :].tolist()]
