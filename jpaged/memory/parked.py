"""ParkedTables: block tables without a row, which sessions hold between their runs. They give way to requests."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jpaged.memory.row_tables import RowTables, held


@dataclasses.dataclass(eq=False, slots=True)
class Table:
    """A block table without a row: one reference an entry, as in any table."""

    blocks: np.ndarray  # int32 [n * G]: table entries, as a row's
    num_computed: int
    """Tokens whose K and V the blocks hold."""
    root: bytes
    digests: list[bytes]
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
        blocks = rows.tables[row, : rows.counts[row]]
        kept = min(rows.blocks_for(num_computed), len(blocks))
        rows.allocator.release(held(blocks[kept:][::-1]))
        table = Table(blocks[:kept].copy(), num_computed, rows.roots[row], rows.digests[row])
        rows.clear(row)
        self._tables[table] = None
        self.truncate(table, num_computed)
        return table

    def can_resume(self, table: Table, num_tokens: int) -> bool:
        """Whether a parked table still has what the next of `num_tokens` tokens attends to."""
        return self._reaches(table, min(table.num_computed, num_tokens - 1))

    def _reaches(self, table: Table, position: int) -> bool:
        """Whether it has all that a token at `position` attends to."""
        return bool((self._rows.leading_nulls(table.blocks) <= self._rows.behind_window(position)).all())

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
        written = np.arange(index * rows.num_groups, min((index + 1) * rows.num_groups, count))  # entries
        shared = written[allocator.refs[table.blocks[written]] > 1].tolist()
        needed = rows.needed(count // rows.num_groups, num_tokens, start)
        if int(needed.sum()) + len(shared) + reserve > allocator.num_free:
            return None
        del self._tables[table]
        rows.lay(row, [*table.blocks.tolist(), *rows.supply(needed)], table.root, table.digests, start)
        copies = [copy for entry in shared if (copy := rows.own(row, entry))]
        if len(table.digests) <= index:
            for block in rows.tables[row, written].tolist():
                if not allocator.is_writable(block):
                    allocator.forget(block)  # it was full once: what comes now is something else
        return start, copies

    def fork(self, table: Table) -> Table:
        """Another table over the same blocks."""
        self._rows.allocator.acquire(held(table.blocks))
        copy = dataclasses.replace(table, digests=table.digests.copy(), pinned=False)
        self._tables[copy] = None
        return copy

    def truncate(self, table: Table, num_computed: int) -> None:
        """Keeps the first `num_computed` tokens' K and V of a parked table; nothing if a window has left them."""
        rows = self._rows
        if not self._reaches(table, min(table.num_computed, num_computed)):
            num_computed = 0
        kept = rows.blocks_for(num_computed)
        rows.allocator.release(held(table.blocks[kept:][::-1]))
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
        return len({block for table in self._tables if table.pinned for block in held(table.blocks).tolist()})

    def entries(self) -> list[int]:
        """The blocks of every parked table, repeats included.

        Raises:
          RuntimeError: in a table, null blocks come after others.
        """
        rows = self._rows
        return [b for t in self for b in rows.checked(t.blocks, rows.leading_nulls(t.blocks), len(t.blocks))]
