"""The KV pool: all blocks, as one array for a layer of each group, and how many of them the memory budget gives.

A layer of a quantised pool is two arrays: 8-bit values, and a scale for each token and head
(`pallas_kernels.paged_attention.QuantizedKV`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding

from jpaged.errors import InvalidConfigError, OutOfMemoryError
from jpaged.models.config import LayerGroups, ModelConfig
from jpaged.models.sharding import POOL, pool_heads
from pallas_kernels.paged_attention import KV, QuantizedKV, pool_shape
from pallas_kernels.paged_attention.quantized import LARGEST

_QUANTIZED = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""What `EngineConfig.kv_cache_dtype` means."""
_SCALE = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class KVPoolSpec:
    """Shape of a pool.

    A pool itself is a plain tuple with one array (or `QuantizedKV`) for a layer of each group, so that models take it
    as they take any pytree. A block belongs to one group of layers at a time, and holds what they keep of its tokens.
    """

    groups: LayerGroups
    num_blocks: int
    """The null block included."""
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    """Of the values. An 8-bit one makes a quantised pool."""
    parts: int = 2
    """Keys and values; 1: keys alone, which are values too."""
    mesh: Mesh | None = None
    """Devices that the KV heads are divided over; None: all are on one."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: jnp.dtype,
        num_blocks: int,
        block_size: int,
        mesh: Mesh | None = None,
        groups: LayerGroups | None = None,
    ) -> "KVPoolSpec":
        """A model's; without `groups`, its layers are one, and no window ever leaves a block."""
        parts, heads, width = config.cache_shape
        heads = pool_heads(heads, 1 if mesh is None else mesh.size)
        groups = groups or LayerGroups.of([None] * config.num_hidden_layers)
        return cls(groups, num_blocks, block_size, heads, width, jnp.dtype(dtype), parts, mesh)

    @property
    def num_arrays(self) -> int:
        """Arrays of the pool: one for a layer of each group."""
        return self.groups.size

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return pool_shape(self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.parts)

    @property
    def quantized(self) -> bool:
        return self.dtype.name in LARGEST

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: what a group's layers keep of `block_size` tokens, on all devices together."""
        vectors = self.parts * self.num_arrays * self.block_size * self.num_kv_heads
        return vectors * (self.head_dim * self.dtype.itemsize + (_SCALE.itemsize if self.quantized else 0))

    @property
    def device_block_bytes(self) -> int:
        """Bytes of one block on each device."""
        return self.block_bytes // (1 if self.mesh is None else self.mesh.size)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def sharding(self) -> Sharding | None:
        """Of every layer's arrays; None: JAX's default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, POOL)

    def abstract(self) -> tuple[Any, ...]:
        """The pool with a `jax.ShapeDtypeStruct` for each array."""
        return self._layers(functools.partial(jax.ShapeDtypeStruct, sharding=self.sharding))

    def allocate(self) -> tuple[KV, ...]:
        """A pool of zeros. Zeros matter: what padding reads must be finite."""
        return self._layers(functools.partial(jnp.zeros, device=self.sharding))

    def _layers(self, make: Callable[[tuple[int, ...], jnp.dtype], Any]) -> tuple[Any, ...]:
        shape = self.layer_shape

        def layer():
            values = make(shape, self.dtype)
            return QuantizedKV(values, make(shape[:-1], _SCALE)) if self.quantized else values

        return tuple(layer() for _ in range(self.num_arrays))


def pool_dtype(kv_cache_dtype: str, model: ModelConfig, dtype: jnp.dtype) -> jnp.dtype:
    """What the pool holds of a model that computes in `dtype`, where `EngineConfig.kv_cache_dtype` is this.

    Raises:
      InvalidConfigError: the model's cache cannot be quantised.
    """
    if kv_cache_dtype == "auto":
        return dtype
    if model.cache_shape[0] == 1:
        raise InvalidConfigError(
            f"kv_cache_dtype={kv_cache_dtype!r} is not for multi-head latent attention: its latents and their rotated "
            "key, whose sizes differ, would share one scale. Leave it at auto; the latents are small already."
        )
    return jnp.dtype(_QUANTIZED[kv_cache_dtype])


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
