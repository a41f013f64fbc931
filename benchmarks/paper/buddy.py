"""BuddyAllocator: chunks of a power of two of blocks, split and merged in pairs (Knuth, TAOCP 1, section 2.5).

The paper assumes it for Orca (section 6.1): contiguous room for a whole sequence, without compaction.

    pool of 22 blocks, largest chunk 8:     [ 8 ][ 8 ][ 4 ][2]
    a chunk's buddy is at start ^ size; free buddies of one size merge, up to the largest chunk
"""

from collections.abc import Iterable

import numpy as np

from jpaged.memory.allocator import NULL_BLOCK


class BuddyAllocator:
    """Hands out chunks; speaks as much of `jpaged.memory.BlockAllocator` as the scheduler reads.

    Args:
      num_blocks: blocks in the pool, the null block included.
      max_chunk: blocks of the largest chunk, a power of two.
    """

    def __init__(self, num_blocks: int, max_chunk: int) -> None:
        if max_chunk < 1 or max_chunk & (max_chunk - 1):
            raise ValueError(f"the largest chunk must be a power of two of blocks, not {max_chunk}")
        self.num_blocks, self.max_chunk = num_blocks, max_chunk
        # Free chunks by size; dicts are ordered sets, so that the chunk freed last is used first.
        self._free: dict[int, dict[int, None]] = {1 << i: {} for i in range(max_chunk.bit_length())}
        self._taken: dict[int, int] = {}  # first block -> size
        start = 0
        for size in reversed(self._free):
            while start + size <= self.num_usable:
                self._free[size][start] = None
                start += size
        self.num_free = self.num_usable
        self.refs = np.ones(num_blocks, np.int32)
        """References of each block: nothing is ever shared."""

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @staticmethod
    def chunk_size(count: int) -> int:
        """Blocks of the chunk that holds `count` of them."""
        return 1 << (count - 1).bit_length()

    def fits(self, counts: Iterable[int]) -> bool:
        """Whether chunks for all of `counts` can be allocated together, whatever their order."""
        wanted = sorted((self.chunk_size(c) for c in counts), reverse=True)
        free = {size: len(chunks) for size, chunks in self._free.items()}
        for size in wanted:
            source = next((s for s in free if s >= size and free[s]), None)
            if source is None:
                return False
            free[source] -= 1
            while source > size:  # the other half of each split stays free
                source //= 2
                free[source] += 1
        return True

    def allocate_chunk(self, count: int) -> range:
        """The blocks of a chunk for `count` blocks, lowest first. The caller asked `fits`."""
        size = self.chunk_size(count)
        source = next(s for s in self._free if s >= size and self._free[s])
        start, _ = self._free[source].popitem()
        while source > size:
            source //= 2
            self._free[source][start + source] = None
        self._taken[start] = size
        self.num_free -= size
        first = start + NULL_BLOCK + 1
        return range(first, first + size)

    def free_chunk(self, first: int) -> None:
        """Takes back the chunk whose first block is `first` and merges it with its free buddies."""
        start = first - NULL_BLOCK - 1
        size = self._taken.pop(start)
        self.num_free += size
        while size < self.max_chunk and (buddy := start ^ size) in self._free[size]:
            del self._free[size][buddy]
            start, size = min(start, buddy), 2 * size
        self._free[size][start] = None

    def check_invariants(self, entries: Iterable[int] = ()) -> None:
        """Raises RuntimeError unless the chunks tile the pool and hold every block of `entries` once."""
        chunks = sorted([(s, n) for n, starts in self._free.items() for s in starts] + list(self._taken.items()))
        end = 0
        for start, size in chunks:
            if start != end or start % size:
                raise RuntimeError(f"chunk {start}+{size} does not follow the one before it, or is not aligned")
            end = start + size
        if end != self.num_usable or self.num_free != self.num_usable - sum(self._taken.values()):
            raise RuntimeError("the chunks do not add up to the pool")
        held = [block - NULL_BLOCK - 1 for block in entries]
        taken = {block for start, size in self._taken.items() for block in range(start, start + size)}
        if len(set(held)) != len(held) or not set(held) <= taken:
            raise RuntimeError("a table entry is no block of a chunk that was handed out, or is in two tables")
