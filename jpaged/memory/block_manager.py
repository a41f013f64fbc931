"""BlockManager: who gets which blocks, found by their tokens where they are there already (paper, sections 4.2 to 4.4).

The tables of running sequences are its rows (`RowTables`); sessions hold others between their runs (`parked`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator
from jpaged.memory.parked import ParkedTables
from jpaged.memory.prefix_cache import PrefixCache, root_digest
from jpaged.memory.row_tables import ENDLESS, RowTables


@dataclasses.dataclass
class PrefixCacheStats:
    """Counted in tokens, as vLLM's prefix_cache_queries and prefix_cache_hits."""

    queries: int = 0
    hits: int = 0


class BlockManager(RowTables):
    """Allocates, shares, copies and frees the blocks of the rows.

    Args:
      num_blocks: blocks in the pool, the null block included.
      watermark: fraction of the pool that admission leaves free, so that running sequences can grow.
      enable_prefix_caching: whether full blocks are kept and found again.
      block_size, max_rows, max_blocks_per_row, windows, max_chunk: see `RowTables`.
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
        windows: Sequence[int | None] = (None,),
        max_chunk: int | None = None,
    ) -> None:
        self.cache = PrefixCache(block_size) if enable_prefix_caching else None
        allocator = BlockAllocator(num_blocks, self.cache.evict if self.cache is not None else None)
        super().__init__(allocator, block_size, max_rows, max_blocks_per_row, windows=windows, max_chunk=max_chunk)
        self.watermark_blocks = int(watermark * allocator.num_usable)
        self.stats = PrefixCacheStats()
        self.weights_version = 0
        """Counts the weights that keys and values are computed with. Blocks are found under equal ones only."""
        self.parked = ParkedTables(self)

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

        Of layer groups with a window, a row that is opened alone gets those for its first chunk: see `extend`.

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
        root, size = root_digest(salt, self.weights_version), self.block_size
        look_up = self.cache is not None and findable != 0
        found = [self._match(t[:findable], root) if look_up else ([], []) for t in tokens]
        siblings = _longest_common_beginnings(tokens, size)
        firsts = [self.leading_nulls(entries) for entries, _ in found]
        for i, (sibling, common) in enumerate(siblings):
            if common > len(found[i][1]) and (firsts[sibling] <= self.behind_window(common * size)).all():
                found[i] = [], []
                firsts[i] = firsts[sibling]
            else:
                siblings[i] = 0, 0
        allocator = self.allocator
        hits = np.array(sorted({block for entries, _ in found for block in entries} - {NULL_BLOCK}), np.int32)
        shares = [max(common, len(digests)) for (_, common), (_, digests) in zip(siblings, found, strict=True)]
        starts = [share * size if len(rows) == 1 else ENDLESS for share in shares]
        needed = [self.needed(*row) for row in zip(shares, map(len, tokens), starts, strict=True)]
        new = sum(int(entries.sum()) for entries in needed)
        revived = int((allocator.refs[hits] == 0).sum())  # hits that nobody holds are among the free ones
        if new + revived + reserve > allocator.num_free:
            return None
        allocator.acquire(hits)  # before anything is allocated, which could evict them
        for i, row in enumerate(rows):
            entries, digests = found[i]
            if not entries and shares[i]:
                sibling = rows[siblings[i][0]]
                entries = self.tables[sibling, : self.blocks_for(shares[i] * size)].tolist()
                digests = self.digests[sibling][: shares[i]]
            allocator.acquire([block for block in entries if block != NULL_BLOCK])
            self.lay(row, [*entries, *self.supply(needed[i])], root, digests, starts[i])
        allocator.release(hits)
        if look_up:
            self.stats.queries += sum(map(len, tokens))
            self.stats.hits += sum(len(digests) for _, digests in found) * size
        return [share * size for share in shares]

    def blocks_to_open(self, lengths: Sequence[int]) -> int:
        """Blocks that `try_open` takes at most, of rows with so many tokens."""
        start = 0 if len(lengths) == 1 else ENDLESS
        return sum(int(self.needed(0, length, start).sum()) for length in lengths)

    def _match(self, tokens: Sequence[int], root: bytes) -> tuple[list[int], list[bytes]]:
        return ([], []) if self.cache is None else self.cache.match(tokens, root, self.behind_window)

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
            blocks = self.by_group[row, index].tolist()
            digest, entered = self.cache.insert(parent, tokens[index * size : (index + 1) * size], blocks)
            for block in entered:
                self.allocator.keep(block)
            digests.append(digest)

    def cached_content(self) -> list[tuple[int, int, bytes, bytes]]:
        """(block, its layer group, digest of its parent, its tokens' int32 bytes) of all blocks that can be found; the
        next to be evicted first, those in use last."""
        content = {} if self.cache is None else self.cache.content()
        idle = [block for block in self.allocator.cached_blocks() if block in content]
        return [(block, *content[block]) for block in [*idle, *(content.keys() - set(idle))]]

    def adopt(self, named: Sequence[tuple[int, bytes, Sequence[int]]]) -> np.ndarray:
        """Gives out a block for each (layer group, digest of its parent, its tokens), to be found by them from now on.

        There must be so many free ones, and the caller writes their K and V before anything else runs. int32 [n].
        """
        blocks = self.allocator.allocate(len(named))
        for block, (group, parent, tokens) in zip(blocks, named, strict=True):
            logical = [block if g == group else NULL_BLOCK for g in range(self.num_groups)]
            _, entered = self.cache.insert(parent, tokens, logical)  # type: ignore[union-attr]  # there is one
            for block in entered:
                self.allocator.keep(block)
        self.allocator.release(blocks)
        return np.array(blocks, np.int32)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content, parked tables included; blocks in use stay in use."""
        for table in list(self.parked):
            self.parked.release(table)
        if self.cache is not None:
            self.cache.clear()
            self.allocator.forget_all()

    def new_weights(self) -> None:
        """Other weights from the next step on. A row may keep what it has: nobody will find it by its content."""
        self.weights_version += 1
        self.reset_prefix_cache()

    def check_invariants(self) -> None:
        """Raises RuntimeError if blocks and tables do not add up (DESIGN, contract 6)."""
        self.allocator.check_invariants(self.entries() + self.parked.entries())


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
