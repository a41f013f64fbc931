"""The two ways to hold a linear layer: `kernel` [in, out], or `weight` [out, in]. See `jpaged.models.dense`."""

from typing import Any

Path = tuple[str, ...]
"""Where a leaf is in a parameter tree: ("layers_0", "self_attn", "q_proj", "kernel")."""


def kernel_path(path: Path) -> Path:
    """The path of a leaf in a tree without weights."""
    return (*path[:-1], "kernel") if path[-1] == "weight" else path


def kernel_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of that leaf there, given the one that it has."""
    return shape[::-1] if path[-1] == "weight" else shape


def respelled(path: Path) -> Path:
    """Where the transpose of a kernel or a weight would be."""
    return (*path[:-1], {"kernel": "weight", "weight": "kernel"}[path[-1]])


def turned(path: Path, leaf: Any) -> Any:
    """From what is at `path` to what would be at `kernel_path(path)`."""
    return leaf.T if path[-1] == "weight" else leaf
