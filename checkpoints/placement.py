"""Parameters on devices: each leaf is read shard by shard, straight to where its sharding wants it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import Progress, aligned_arrays
from checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    import jax

Index = tuple[slice, ...]
"""A part of an array: start and stop in each dimension, step one."""

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], "jax.sharding.Sharding | None"]
"""sharding_of(path, shape): where a parameter of our tree goes; None: it stays a NumPy array on the host."""


def on_the_host(path: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """The `ShardingOf` that leaves every parameter on the host."""


@dataclass(frozen=True)
class Target:
    """How parameters are wanted."""

    dtype: np.dtype
    """Element type of all of them."""

    sharding_of: ShardingOf = on_the_host
    """Where each goes."""

    progress: Progress | None = None
    """Who is told of how many have been read."""

    as_stored: bool = False
    """Whether linear layers stay [out, in] where files hold them so; see `jpaged.models.dense`."""


def as_sharding_of(sharding: Any) -> ShardingOf:
    """What `checkpoints.load(sharding=...)` takes, as a function.

    sharding: None, a function already, or a nested dict of shardings like the parameter tree; a sharding (or None) in
        place of a subtree counts for all of it.
    """
    if callable(sharding):
        return sharding
    if sharding is None:
        return on_the_host

    def look_up(path: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        node = sharding
        for key in path:
            if not isinstance(node, Mapping):
                break
            if key not in node:
                raise CheckpointError(f"sharding says nothing of {'/'.join(path)}; give None to leave it on the host")
            node = node[key]
        return node

    return look_up


def place(
    shape: tuple[int, ...], dtype: np.dtype, sharding: "jax.sharding.Sharding", fill: Callable[[Index, NDArray], None]
) -> "jax.Array":
    """Makes an array on the devices of `sharding`, one shard at a time.

    Args:
        shape: of the whole array.
        dtype: of it.
        sharding: which device of this process holds which part.
        fill: fill(index, part) writes a part of the array into `part`, which has the part's shape.

    Returns:
        The array. Devices that hold the same part get it from one buffer; CPU devices keep that buffer.

    Raises:
        CheckpointError: the sharding does not divide the shape.
    """
    import jax

    try:
        where = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise CheckpointError(f"a parameter of shape {list(shape)} cannot be sharded as asked: {error}") from error
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in where.items():
        key = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(key, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        [part] = aligned_arrays([tuple(stop - start for start, stop in bounds)], dtype)
        fill(tuple(slice(*bound) for bound in bounds), part)
        part.flags.writeable = False
        shards += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(shards[-len(devices) :])  # or the next part is read while this one is on its way
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def whole(shape: tuple[int, ...]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def held_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a whole array."""
    return prod(shape) * dtype.itemsize
