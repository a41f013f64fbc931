"""Who owns which block: references, block tables, the prefix cache, swap space. Plain Python and NumPy, no JAX."""

from jpaged.memory.allocator import BlockAllocator
from jpaged.memory.block_manager import BlockManager
from jpaged.memory.parked import ParkedTables, Table
from jpaged.memory.prefix_cache import PrefixCache
from jpaged.memory.swap_space import Swapped, SwapSpace

__all__ = ["BlockAllocator", "BlockManager", "ParkedTables", "PrefixCache", "SwapSpace", "Swapped", "Table"]
