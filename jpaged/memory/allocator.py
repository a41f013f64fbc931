"""BlockAllocator: which blocks of the pool are in use, and by how many table entries.

Every block is in exactly one of three states (DESIGN, contract 6):

    free        in `_free`; its content is worthless
    cached      in `_cached`; nobody refers to it, its content may be found again (prefix cache), LRU order
    referenced  `refs[block] >= 1`: one reference per block-table entry

         allocate            acquire (again)
    free ---------> referenced <---------- cached
      ^                |   |                  |
      |  release       |   |  release, kept   |  evicted by allocate, when nothing is free
      +----------------+   +----------------> +--------> referenced

Block 0 is the null block: padding rows write there, and it is never handed out.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

NULL_BLOCK = 0

Blocks = Sequence[int] | np.ndarray


class BlockAllocator:
    """Reference-counted allocation of fixed-size blocks.

    Args:
      num_blocks: blocks in the pool, the null block included; at least 2.
      on_evict: called with a block whose cached content is about to be lost.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and one more, not {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.refs = np.zeros(num_blocks, np.int32)
        """References of each block; read by anyone, written here alone."""
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: low ids are handed out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # first = least recently used
        self._kept: set[int] = set()  # blocks whose content is registered, referenced or not
        self._on_evict = on_evict or (lambda block: None)

    @property
    def num_usable(self) -> int:
        """Blocks that can ever hold tokens."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def cached_blocks(self) -> tuple[int, ...]:
        """The cached blocks, the next to be evicted first."""
        return tuple(self._cached)

    def is_writable(self, block: int) -> bool:
        """Whether its one holder may write to it: nobody else refers to it, and nobody will find it by its content."""
        return self.refs[block] == 1 and block not in self._kept

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` blocks with one reference each; evicts the least recently used if it must.

        The caller checks `num_free` first: being short of blocks is a scheduling matter, not an error.
        """
        free, blocks = self._free, []
        for _ in range(count):
            if free:
                block = free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._kept.discard(block)
                self._on_evict(block)
            blocks.append(block)
        self.refs[blocks] = 1
        return blocks

    def acquire(self, blocks: Blocks) -> None:
        """Adds a reference to each of some distinct blocks; cached ones come back to life."""
        blocks = np.asarray(blocks, np.int32)
        for block in blocks[self.refs[blocks] == 0].tolist():
            del self._cached[block]
        self.refs[blocks] += 1

    def release(self, blocks: Blocks) -> None:
        """Drops one reference of each of some distinct blocks.

        Earlier ones are evicted earlier: pass a table's tail first.
        """
        blocks = np.asarray(blocks, np.int32)
        self.refs[blocks] -= 1
        for block in blocks[self.refs[blocks] == 0].tolist():
            if block in self._kept:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Marks a referenced block's content as worth keeping once nobody refers to it."""
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """Drops the kept content of a referenced block: whoever holds it is about to overwrite it."""
        self._kept.remove(block)
        self._on_evict(block)

    def forget_all(self) -> None:
        """Drops every kept content: cached blocks become free ones."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._kept.clear()

    def check_invariants(self, entries: Iterable[int] = ()) -> None:
        """Raises RuntimeError unless free + cached + referenced = all and references = table entries.

        Args:
          entries: every entry of every live block table, repeats included.
        """
        counts = np.bincount(np.fromiter(entries, np.int64), minlength=self.num_blocks)
        free, cached = set(self._free), set(self._cached)
        referenced = set(np.flatnonzero(self.refs).tolist())
        problems = []
        if not np.array_equal(counts, self.refs):
            wrong = np.flatnonzero(counts != self.refs).tolist()
            problems.append(f"references differ from table entries at blocks {wrong[:8]}")
        if len(free) != len(self._free):
            problems.append("a block is free twice")
        if free & cached or free & referenced or cached & referenced:
            problems.append("a block is in two states")
        if free | cached | referenced != set(range(1, self.num_blocks)):
            problems.append("a block is in no state, or the null block is in one")
        if not cached <= self._kept or free & self._kept:
            problems.append("cached blocks and kept contents differ")
        if problems:
            raise RuntimeError("block allocator invariants broken: " + "; ".join(problems))
