"""BlockManager: the block table of every row, grown on demand (paper, section 4.2).

    tables[row]   logical block -> physical block      [ 7 | 3 | 12 | 0 | 0 ... ]   0 = null block: no entry
    counts[row]   entries in use                         3

A row is a running sequence's place in the batch. Its table lives here while the sequence runs; sequences
that wait hold no blocks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator
from jpaged.memory.prefix_cache import PrefixCache, root_digest


@dataclasses.dataclass
class PrefixCacheStats:
    """Counted in tokens, as vLLM's prefix_cache_queries and prefix_cache_hits."""

    queries: int = 0
    hits: int = 0


class BlockManager:
    """Allocates, shares and frees the blocks of the rows.

    Args:
      num_blocks: blocks in the pool, the null block included.
      block_size: tokens a block.
      max_rows: rows of the batch.
      max_blocks_per_row: width of a block table.
      watermark: fraction of the pool that admission leaves free, so that running sequences can grow.
      enable_prefix_caching: whether full blocks are kept and found again.
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
    ) -> None:
        self.block_size = block_size
        self.cache = PrefixCache(block_size) if enable_prefix_caching else None
        self.allocator = BlockAllocator(num_blocks, self.cache.evict if self.cache is not None else None)
        self.watermark_blocks = int(watermark * self.allocator.num_usable)
        self.tables = np.full((max_rows, max_blocks_per_row), NULL_BLOCK, np.int32)
        self.counts = np.zeros(max_rows, np.int32)
        self.stats = PrefixCacheStats()
        # The chain of each row: digests[row][i] names its blocks 0..i; it may lag behind the table.
        self._digests: list[list[bytes]] = [[] for _ in range(max_rows)]
        self._roots: list[bytes] = [b""] * max_rows

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def num_free(self) -> int:
        return self.allocator.num_free

    @property
    def num_used(self) -> int:
        """Blocks that some row refers to."""
        return self.allocator.num_usable - self.allocator.num_free

    def try_open(
        self, row: int, tokens: Sequence[int], *, salt: str = "", use_cache: bool = True, reserve: int = 0
    ) -> int | None:
        """Gives a row the blocks of all its known tokens, shared with the cache where they are known.

        Args:
          row: a row without blocks.
          tokens: the sequence's tokens so far.
          salt: sequences share blocks only under equal salts.
          use_cache: False computes everything anew (prompt log-probabilities need every position).
          reserve: blocks that must stay free afterwards.

        Returns: tokens whose K and V are there already, or None (and nothing changed) if blocks are short.
        """
        root = root_digest(salt)
        hits: list[int] = []
        digests: list[bytes] = []
        if self.cache is not None and use_cache:
            hits, digests = self.cache.match(tokens, root)
        allocator = self.allocator
        new = self.blocks_for(len(tokens)) - len(hits)
        revived = sum(allocator.references(block) == 0 for block in hits)  # hits are taken from the free ones
        if new + revived + reserve > allocator.num_free:
            return None
        for block in hits:
            allocator.acquire(block)
        blocks = hits + allocator.allocate(new)
        self.tables[row, : len(blocks)] = blocks
        self.counts[row] = len(blocks)
        self._roots[row] = root
        self._digests[row] = digests
        if self.cache is not None and use_cache:
            self.stats.queries += len(tokens)
            self.stats.hits += len(hits) * self.block_size
        return len(hits) * self.block_size

    def grow(self, rows: np.ndarray) -> np.ndarray:
        """Appends one block to each of `rows` (int array); returns the blocks. The caller checked num_free."""
        blocks = np.array(self.allocator.allocate(len(rows)), np.int32)
        self.tables[rows, self.counts[rows]] = blocks
        self.counts[rows] += 1
        return blocks

    def seal(self, row: int, tokens: Sequence[int], num_computed: int) -> None:
        """Enters the row's full blocks into the prefix cache.

        Args:
          tokens: the sequence's tokens.
          num_computed: tokens whose K and V have been computed by steps that are launched. Steps run in
            order, so whoever is given such a block reads it after it was written.
        """
        if self.cache is None:
            return
        digests, size = self._digests[row], self.block_size
        for index in range(len(digests), num_computed // size):
            parent = digests[-1] if digests else self._roots[row]
            block = int(self.tables[row, index])
            digest, entered = self.cache.insert(parent, tokens[index * size : (index + 1) * size], block)
            if entered:
                self.allocator.keep(block)
            digests.append(digest)

    def close(self, row: int) -> None:
        """Releases a row's blocks, tail first, so that shared beginnings are evicted last."""
        count = int(self.counts[row])
        self.allocator.release(self.tables[row, :count][::-1].tolist())
        self.tables[row, :count] = NULL_BLOCK
        self.counts[row] = 0
        self._digests[row] = []

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content; blocks in use stay in use."""
        if self.cache is not None:
            self.cache.clear()
            self.allocator.forget_all()

    def check_invariants(self) -> None:
        """Raises RuntimeError if blocks and tables do not add up (DESIGN, contract 6)."""
        entries = [b for row, n in enumerate(self.counts.tolist()) for b in self.tables[row, :n].tolist()]
        if NULL_BLOCK in entries:
            raise RuntimeError("a table entry in use points to the null block")
        for row, count in enumerate(self.counts.tolist()):
            if self.tables[row, count:].any():
                raise RuntimeError(f"row {row} has table entries beyond its count")
        self.allocator.check_invariants(entries)
