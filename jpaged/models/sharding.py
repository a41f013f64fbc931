"""Tensor parallelism: how parameters, pool and attention lie on a mesh of devices.

    path of a leaf --logical_axes--> ("embed", "heads") --rules--> PartitionSpec(None, "tensor")

Parameters stay plain arrays; GSPMD (arXiv 2105.04663) divides the matmuls by where their operands lie. What it can't
divide, since kernels and loops are opaque to it, runs under `jax.shard_map` over the mesh that is in scope
(`jax.set_mesh`): attention over heads, mixtures of experts over the width of each expert. Without a mesh nothing of
this is there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints.spelling import Path
from jpaged.errors import InvalidConfigError
from jpaged.models.config import ModelConfig

TENSOR = "tensor"
"""The mesh axis of tensor parallelism."""

Rules = Mapping[str, str | None]

DEFAULT_RULES: Rules = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "qkv": TENSOR,
    "mlp": TENSOR,
    "embed": None,
    "expert": None,
    "latent": None,
    "position": None,
}
"""Logical axis -> mesh axis, or None: whole on every device."""

_MATRICES: dict[str, tuple[str, str]] = {
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "embed_positions": ("position", "embed"),
    **dict.fromkeys(("q_proj", "query_key_value"), ("embed", "heads")),  # GPT-NeoX's holds q, k, v head by head
    **dict.fromkeys(("k_proj", "v_proj"), ("embed", "kv_heads")),
    **dict.fromkeys(("c_attn", "qkv_proj"), ("embed", "qkv")),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "attn/c_proj"), ("heads", "embed")),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h"), ("embed", "mlp")),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h", "mlp/c_proj"), ("mlp", "embed")),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), ("embed", "latent")),
    **dict.fromkeys(("q_b_proj", "kv_b_proj"), ("latent", "heads")),
}
"""(in, out) of the modules that hold a matrix. A module that is not here is whole on every device."""


def logical_axes(path: Path, shape: tuple[int, ...], config: ModelConfig) -> tuple[str | None, ...]:
    """The name of each axis of a parameter; None: it has none, and is never divided."""
    if path[-1] == "sinks":
        return ("heads",)
    if path[-2] in ("q_norm", "k_norm") and shape[0] > config.head_dim:  # OLMo 2's, of all heads together
        return ("heads" if path[-2] == "q_norm" else "kv_heads",)
    experts = path[-2] == "experts"  # they hold their arrays themselves, without a module for each
    name = path[-1].removesuffix("_bias") if experts else path[-2]
    axes: tuple[str | None, ...] | None = _MATRICES.get(name) or _MATRICES.get("/".join(path[-3:-1]))
    if axes is None:
        return (None,) * len(shape)
    if path[-1].endswith("bias"):
        axes = axes[1:]
    return ("expert", *axes) if experts else axes


def param_shardings(
    config: ModelConfig, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Callable[[Path, tuple[int, ...]], NamedSharding]:
    """Where each parameter goes: a function (path, shape) -> its sharding.

    An axis that the mesh does not divide is whole on every device: a vocabulary of 50257 on two, or the keys of two
    heads on four.

    Args:
      mesh: with an axis for each that the rules name.
      rules: see `DEFAULT_RULES`.
    """
    units = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}  # heads are never cut

    def sharding(path: Path, shape: tuple[int, ...]) -> NamedSharding:
        spec = []
        for axis, size in zip(logical_axes(path, shape, config), shape, strict=True):
            target = rules.get(axis) if axis else None
            count = math.gcd(units.get(axis or "", size), size)
            spec.append(target if target and count % mesh.shape[target] == 0 else None)
        return NamedSharding(mesh, P(*spec))

    return sharding


def shard_params(params: Any, sharding: Callable[[Path, tuple[int, ...]], NamedSharding]) -> Any:
    """A Linen parameter tree, placed; arrays that are there already are not copied."""

    def place(path, leaf):
        return jax.device_put(leaf, sharding(tuple(key.key for key in path), leaf.shape))

    return jax.tree.map_with_path(place, params)


def tensor_mesh(size: int, config: ModelConfig) -> Mesh | None:
    """The first `size` devices along "tensor"; None for one device, which needs no mesh.

    Raises:
      InvalidConfigError: there are not as many devices, or the heads can't be divided.
    """
    if size == 1:
        return None
    devices = jax.devices()
    if size > len(devices):
        raise InvalidConfigError(
            f"tensor_parallel_size={size} needs as many devices, and JAX sees {len(devices)} ({devices[0].platform}): "
            "lower it, or make more visible. To try it on CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={size} before JAX starts."
        )
    heads = config.num_attention_heads
    if heads % size:
        able = [n for n in range(1, min(heads, len(devices)) + 1) if heads % n == 0]
        raise InvalidConfigError(
            f"tensor_parallel_size={size} does not divide the model's {heads} attention heads: use one of "
            f"{', '.join(map(str, able))}."
        )
    return jax.make_mesh((size,), (TENSOR,), (AxisType.Auto,), devices=devices[:size])


def pool_heads(kv_heads: int, size: int) -> int:
    """KV heads of a pool on so many devices: each is repeated until the devices divide them.

    So every device holds the heads that its queries read, and MLA's single latent is on all.
    """
    return math.lcm(kv_heads, size)


POOL = P(None, None, TENSOR)
"""Of a layer's pool [num_blocks, 2, Hkv, block_size, D] (and of the scales of a quantised one)."""
HEADS = P(None, TENSOR)
"""Of queries, keys and values [T, heads, D]."""


def tensor_size() -> int:
    """Devices along "tensor" of the mesh in scope; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)


def split(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device's part of its arguments; the function itself where there is no mesh."""
    if tensor_size() == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def split_width(function: Callable, width: int, in_specs: Any) -> Callable:
    """As `split`, of a function whose results add up over slices of a width; whole where the width can't be cut."""
    if tensor_size() == 1 or width % tensor_size():
        return function
    return split(lambda *arguments: jax.lax.psum(function(*arguments), TENSOR), in_specs, P())


def once(x: jax.Array) -> jax.Array:
    """Inside `split_width`: what is to be added once. Zeros on all devices but the first."""
    if TENSOR not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    return jnp.where(jax.lax.axis_index(TENSOR) == 0, x, 0)
