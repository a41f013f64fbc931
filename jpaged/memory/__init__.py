"""Who owns which block: reference counts, block tables, the prefix cache. Plain Python and NumPy, no JAX."""

from jpaged.memory.allocator import BlockAllocator
from jpaged.memory.block_manager import BlockManager
from jpaged.memory.prefix_cache import PrefixCache

__all__ = ["BlockAllocator", "BlockManager", "PrefixCache"]
