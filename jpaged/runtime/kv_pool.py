"""The KV pool: all blocks of all layers, as one array a layer, and how many of them the memory budget gives."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding

from jpaged.errors import OutOfMemoryError
from jpaged.models.config import ModelConfig
from jpaged.models.sharding import POOL, pool_heads
from pallas_kernels.paged_attention import pool_shape


@dataclasses.dataclass(frozen=True)
class KVPoolSpec:
    """Shape of a pool.

    A pool itself is a plain tuple with one array a layer, so that models take it as they take any pytree.
    """

    num_layers: int
    num_blocks: int
    """The null block included."""
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    parts: int = 2
    """Keys and values; 1: keys alone, which are values too."""
    mesh: Mesh | None = None
    """Devices that the KV heads are divided over; None: all are on one."""

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: jnp.dtype, num_blocks: int, block_size: int, mesh: Mesh | None = None
    ) -> "KVPoolSpec":
        parts, heads, width = config.cache_shape
        heads = pool_heads(heads, 1 if mesh is None else mesh.size)
        return cls(config.num_hidden_layers, num_blocks, block_size, heads, width, jnp.dtype(dtype), parts, mesh)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return pool_shape(self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.parts)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: what all layers keep of `block_size` tokens, on all devices together."""
        values = self.parts * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return values * self.dtype.itemsize

    @property
    def device_block_bytes(self) -> int:
        """Bytes of one block on each device."""
        return self.block_bytes // (1 if self.mesh is None else self.mesh.size)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def sharding(self) -> Sharding | None:
        """Of every layer's array; None: JAX's default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, POOL)

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct(self.layer_shape, self.dtype, sharding=self.sharding),) * self.num_layers

    def allocate(self) -> tuple[jax.Array, ...]:
        """A pool of zeros. Zeros matter: what padding reads must be finite."""
        return tuple(jnp.zeros(self.layer_shape, self.dtype, device=self.sharding) for _ in range(self.num_layers))


def blocks_in_budget(budget_bytes: int, spec: KVPoolSpec, useful_blocks: int) -> int:
    """Blocks that fit into a budget of each device, but not more than could ever be in use.

    Raises:
      OutOfMemoryError: not even two blocks fit.
    """
    blocks = min(budget_bytes // spec.device_block_bytes, useful_blocks)
    if blocks < 2:
        raise OutOfMemoryError(
            f"the memory budget leaves {max(budget_bytes, 0) / 2**20:.0f} MiB for the KV cache and one block takes "
            f"{spec.device_block_bytes / 2**20:.2f} MiB: raise kv_cache_memory_bytes or gpu_memory_utilization, or "
            "lower max_num_batched_tokens."
        )
    return int(blocks)


def available_host_memory() -> int:
    """Bytes that the operating system could give us now."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30  # not Linux: a modest guess


def cpu_budget(available: int) -> int:
    """Bytes for the pool on CPU when nothing is said: an eighth of free memory, between 256 MiB and 1 GiB.

    A power of two, because the pool's shape is part of every compiled step: a budget that follows free memory to
    the byte would compile everything anew at each start.
    """
    return min(max(1 << (available // 8).bit_length() - 1, 256 << 20), 1 << 30) if available >= 8 else 256 << 20


def swap_blocks(gibibytes: float, available: int, spec: KVPoolSpec) -> int:
    """Blocks that swap space holds: as asked for, but at most half of the host's free memory and a pool's worth."""
    return min(int(min(gibibytes * (1 << 30), available / 2)) // spec.block_bytes, spec.num_blocks)


def stable_blocks(num_blocks: int) -> int:
    """Rounded down to six significant bits (at most 3 % less), for the same reason: free GPU memory varies a little."""
    step = 1 << max(num_blocks.bit_length() - 6, 0)
    return num_blocks // step * step
