"""BlockAllocator: which blocks of the pool are in use, and by how many table entries.

Every block is in exactly one of three states (DESIGN, contract 6):

    free        in `_free`; its content is worthless
    cached      in `_cached`; nobody refers to it, its content may be found again (prefix cache), LRU order
    referenced  `_refs[block] >= 1`: one reference per block-table entry

         allocate            acquire (again)
    free ---------> referenced <---------- cached
      ^                |   |                  |
      |  release       |   |  release, kept   |  evicted by allocate, when nothing is free
      +----------------+   +----------------> +--------> referenced

Block 0 is the null block: padding rows write there, and it is never handed out.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

NULL_BLOCK = 0


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
        self._refs = [0] * num_blocks
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

    def references(self, block: int) -> int:
        return self._refs[block]

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
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, block: int) -> None:
        """Adds a reference; a cached block comes back to life."""
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drops one reference of each block. Earlier ones are evicted earlier: pass a table's tail first."""
        for block in blocks:
            count = self._refs[block] - 1
            self._refs[block] = count
            if count == 0:
                if block in self._kept:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """Marks a referenced block's content as worth keeping once nobody refers to it."""
        self._kept.add(block)

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
        counts = [0] * self.num_blocks
        for block in entries:
            counts[block] += 1
        free, cached = set(self._free), set(self._cached)
        referenced = {b for b in range(self.num_blocks) if self._refs[b]}
        problems = []
        if counts != self._refs:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._refs[b]]
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
