"""BlockManager: the block table of every row, grown on demand, shared and copied on write (paper, sections 4.2 to 4.4).

    tables[row]   logical block -> physical block      [ 7 | 3 | 12 | 0 | 0 ... ]   0 = null block: no entry
    counts[row]   entries in use                         3
    firsts[row]   entries before these are null again    0   (they lie behind the sliding window)

A row is a running sequence's place in the batch. Its table lives here while the sequence runs. A table may also be
parked: it keeps its blocks and has no row (`Table`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator
from jpaged.memory.prefix_cache import PrefixCache, root_digest

_ENDLESS = 1 << 30  # a window that nothing ever leaves


@dataclasses.dataclass
class PrefixCacheStats:
    """Counted in tokens, as vLLM's prefix_cache_queries and prefix_cache_hits."""

    queries: int = 0
    hits: int = 0


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


class Writes(NamedTuple):
    """Where the next tokens of some rows go, and what has to be allocated for that."""

    rows: np.ndarray  # int32 [d]
    indices: np.ndarray  # int32 [d]: logical block
    fresh: np.ndarray  # bool [d]: that block is not there yet
    shared: np.ndarray  # bool [d]: it is there, and others hold it too
    num_blocks: int


class BlockManager:
    """Allocates, shares, copies and frees the blocks of the rows.

    Args:
      num_blocks: blocks in the pool, the null block included.
      block_size: tokens a block.
      max_rows: rows of the batch.
      max_blocks_per_row: width of a block table.
      watermark: fraction of the pool that admission leaves free, so that running sequences can grow.
      enable_prefix_caching: whether full blocks are kept and found again.
      window: no layer attends to more than so many tokens, the query's own included; blocks behind are given back.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        max_blocks_per_row: int,
        *,
        watermark: float = 0.01,
        enable_prefix_caching: bool = True,
        window: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.cache = PrefixCache(block_size) if enable_prefix_caching else None
        self.allocator = BlockAllocator(num_blocks, self.cache.evict if self.cache is not None else None)
        self.watermark_blocks = int(watermark * self.allocator.num_usable)
        self.tables = np.full((max_rows, max_blocks_per_row), NULL_BLOCK, np.int32)
        self.counts = np.zeros(max_rows, np.int32)
        self.firsts = np.zeros(max_rows, np.int32)
        self.stats = PrefixCacheStats()
        self.num_copies = 0
        """Blocks copied on write, ever."""
        self.weights_version = 0
        """Counts the weights that keys and values are computed with. Blocks are found under equal ones only."""
        self.version = 0
        """Changes whenever rows may have begun, or ceased, to share blocks."""
        # The chain of each row: digests[row][i] names its blocks 0..i; it may lag behind the table.
        self.digests: list[list[bytes]] = [[] for _ in range(max_rows)]
        self.roots: list[bytes] = [b""] * max_rows
        self._parked: dict[Table, None] = {}

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

    # ------------------------------------------------------------------------------------------ open and close

    def try_open(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        salt: str = "",
        findable: int | None = None,
        reserve: int = 0,
    ) -> list[int] | None:
        """Gives rows the blocks of all their known tokens, shared where they begin like cached ones or each other.

        Args:
          rows: rows without blocks.
          tokens: of each row, the sequence's tokens so far.
          salt: sequences share blocks only under equal salts.
          findable: only so many first tokens are looked up, less one: log-probabilities of a prompt need its other
            positions computed. None: all.
          reserve: blocks that must stay free afterwards.

        Returns: of each row, the tokens whose K and V are there, or will be once the rows before it are computed; or
        None (and nothing changed) if blocks are short.
        """
        root = root_digest(salt, self.weights_version)
        look_up = self.cache is not None and findable != 0
        found = [self._match(t[:findable], root) if look_up else ([], []) for t in tokens]
        siblings = _longest_common_beginnings(tokens, self.block_size)
        firsts = [blocks.count(NULL_BLOCK) for blocks, _ in found]
        for i, (sibling, common) in enumerate(siblings):
            if common > len(found[i][0]) and firsts[sibling] <= self.behind_window(common * self.block_size):
                found[i] = [], []
                firsts[i] = firsts[sibling]
            else:
                siblings[i] = 0, 0
        allocator = self.allocator
        hits = np.array(sorted({block for blocks, _ in found for block in blocks} - {NULL_BLOCK}), np.int32)
        shares = [max(common, len(blocks)) for (_, common), (blocks, _) in zip(siblings, found, strict=True)]
        new = sum(self.blocks_for(len(t)) - share for t, share in zip(tokens, shares, strict=True))
        revived = int((allocator.refs[hits] == 0).sum())  # hits that nobody holds are among the free ones
        if new + revived + reserve > allocator.num_free:
            return None
        allocator.acquire(hits)  # before anything is allocated, which could evict them
        for i, row in enumerate(rows):
            blocks, digests = found[i]
            if not blocks and shares[i]:
                sibling = rows[siblings[i][0]]
                blocks, digests = self.tables[sibling, : shares[i]].tolist(), self.digests[sibling][: shares[i]]
            allocator.acquire(blocks[firsts[i] :])
            new_blocks = allocator.allocate(self.blocks_for(len(tokens[i])) - len(blocks))
            self.lay(row, [*blocks, *new_blocks], root, digests, firsts[i])
        allocator.release(hits)
        if look_up:
            self.stats.queries += sum(map(len, tokens))
            self.stats.hits += sum(len(blocks) for blocks, _ in found) * self.block_size
        return [share * self.block_size for share in shares]

    def _match(self, tokens: Sequence[int], root: bytes) -> tuple[list[int], list[bytes]]:
        return ([], []) if self.cache is None else self.cache.match(tokens, root, self.behind_window)

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
        self._clear(row)

    def lay(
        self, row: int, blocks: Sequence[int] | np.ndarray, root: bytes, digests: list[bytes], first: int = 0
    ) -> None:
        self.tables[row, : len(blocks)] = blocks
        self.counts[row], self.firsts[row] = len(blocks), first
        self.roots[row], self.digests[row] = root, digests
        self.version += 1

    def _clear(self, row: int) -> None:
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
            copy = self._own(int(writes.rows[i]), int(writes.indices[i]))
            if copy is not None:
                new[i] = copy[1]
                copies.append(copy)
        return new, copies

    def _own(self, row: int, index: int) -> tuple[int, int] | None:
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

    # ------------------------------------------------------------------------------------------- prefix caching

    def seal(self, row: int, tokens: Sequence[int], num_computed: int) -> None:
        """Enters the row's full blocks into the prefix cache.

        Args:
          tokens: the sequence's tokens.
          num_computed: tokens whose K and V have been computed by steps that are launched. Steps run in
            order, so whoever is given such a block reads it after it was written.
        """
        if self.cache is None:
            return
        digests, size = self.digests[row], self.block_size
        for index in range(len(digests), num_computed // size):
            parent = digests[-1] if digests else self.roots[row]
            block = int(self.tables[row, index])
            digest, entered = self.cache.insert(parent, tokens[index * size : (index + 1) * size], block)
            if entered:
                self.allocator.keep(block)
            digests.append(digest)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content, parked tables included; blocks in use stay in use."""
        for table in list(self._parked):
            self.release_parked(table)
        if self.cache is not None:
            self.cache.clear()
            self.allocator.forget_all()

    def new_weights(self) -> None:
        """Other weights from the next step on. A row may keep what it has: nobody will find it by its content."""
        self.weights_version += 1
        self.reset_prefix_cache()

    # ------------------------------------------------------------------------------------------- parked tables

    def park(self, row: int, num_computed: int) -> Table:
        """Takes a row's table off the row, with the blocks of its first `num_computed` tokens."""
        blocks, first = self.tables[row, : self.counts[row]].copy(), int(self.firsts[row])
        table = Table(blocks, num_computed, self.roots[row], self.digests[row], first)
        self._clear(row)
        self._parked[table] = None
        self.truncate_parked(table, num_computed)
        return table

    def can_resume(self, table: Table, num_tokens: int) -> bool:
        """Whether a parked table still has what the next of `num_tokens` tokens attends to."""
        return table.first <= self.behind_window(min(table.num_computed, num_tokens - 1))

    def try_unpark(
        self, table: Table, row: int, num_tokens: int, reserve: int = 0
    ) -> tuple[int, list[tuple[int, int]]] | None:
        """Gives a row a parked table, and the blocks that `num_tokens` tokens need besides.

        The last token is computed again if it was computed, for its logits. The caller checked `can_resume`.

        Returns: (tokens that need not be computed, (source, destination) blocks to be copied), or None (and nothing
        changed) if blocks are short.
        """
        start = min(table.num_computed, num_tokens - 1)
        index, count = start // self.block_size, len(table.blocks)
        shared = index < count and self.allocator.refs[table.blocks[index]] > 1
        new = self.blocks_for(num_tokens) - count
        if new + shared + reserve > self.num_free:
            return None
        del self._parked[table]
        blocks = [*table.blocks.tolist(), *self.allocator.allocate(new)]
        self.lay(row, blocks, table.root, table.digests, table.first)
        copy = self._own(row, index) if shared else None
        if len(table.digests) <= index < count and not self.allocator.is_writable(self.tables[row, index]):
            self.allocator.forget(int(self.tables[row, index]))  # it was full once: what comes now is something else
        return start, [copy] if copy else []

    def fork_parked(self, table: Table) -> Table:
        """Another table over the same blocks."""
        self.allocator.acquire(table.blocks[table.first :])
        copy = dataclasses.replace(table, digests=table.digests.copy(), pinned=False)
        self._parked[copy] = None
        return copy

    def truncate_parked(self, table: Table, num_computed: int) -> None:
        """Keeps the first `num_computed` tokens' K and V of a parked table; nothing if the window has left them."""
        if table.first > self.behind_window(min(table.num_computed, num_computed)):
            num_computed = 0
        kept = self.blocks_for(num_computed)
        self.allocator.release(table.blocks[max(kept, table.first) :][::-1])
        table.first = min(table.first, kept)
        table.blocks, table.num_computed = table.blocks[:kept], min(table.num_computed, num_computed)
        del table.digests[num_computed // self.block_size :]

    def release_parked(self, table: Table) -> None:
        """Gives a parked table's blocks back; nothing is left of it but the cache's memory of full blocks."""
        if table in self._parked:
            self.truncate_parked(table, 0)
            del self._parked[table]

    @property
    def parked(self) -> list[Table]:
        """The longest parked first."""
        return list(self._parked)

    def reclaim(self, wanted: int) -> bool:
        """Releases parked tables, the longest parked first, until `wanted` blocks are free or all left are pinned.

        Returns: whether any was released.
        """
        before = len(self._parked)
        for table in list(self._parked):
            if self.num_free >= wanted:
                break
            if not table.pinned:
                self.release_parked(table)
        return len(self._parked) < before

    @property
    def num_pinned(self) -> int:
        """Blocks that pinned tables keep from everybody else."""
        return len({block for table in self._parked if table.pinned for block in table.blocks[table.first :].tolist()})

    def check_invariants(self) -> None:
        """Raises RuntimeError if blocks and tables do not add up (DESIGN, contract 6)."""
        spans = enumerate(zip(self.firsts.tolist(), self.counts.tolist(), strict=True))
        entries = [b for row, (first, count) in spans for b in self.tables[row, first:count].tolist()]
        entries += [b for table in self._parked for b in table.blocks[table.first :].tolist()]
        if NULL_BLOCK in entries:
            raise RuntimeError("a table entry in use points to the null block")
        for row, count in enumerate(self.counts.tolist()):
            if self.tables[row, count:].any():
                raise RuntimeError(f"row {row} has table entries beyond its count")
            if self.tables[row, : self.firsts[row]].any():
                raise RuntimeError(f"row {row} has table entries behind its window")
        if any(table.blocks[: table.first].any() for table in self._parked):
            raise RuntimeError("a parked table has entries behind its window")
        self.allocator.check_invariants(entries)


def _longest_common_beginnings(lists: Sequence[Sequence[int]], block_size: int) -> list[tuple[int, int]]:
    """Of each list: (an earlier list that begins alike, full blocks that they have in common); (0, 0) for none.

    A list's last token never counts as common: it must be computed for its logits.
    """
    arrays = [np.asarray(tokens, np.int32) for tokens in lists] if len(lists) > 1 else [np.empty(0)]
    best = [(0, 0)]
    for j in range(1, len(arrays)):
        mine, chosen = arrays[j][:-1], (0, 0)
        for i in range(j):
            size = min(len(mine), len(arrays[i]))
            differs = mine[:size] != arrays[i][:size]
            common = (int(differs.argmax()) if differs.any() else size) // block_size
            if common > chosen[1]:
                chosen = i, common
        best.append(chosen)
    return best
