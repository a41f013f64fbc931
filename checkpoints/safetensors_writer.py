"""Safetensors files in shards, as Hugging Face folders have them, written one tensor at a time."""

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.safetensors_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str], np.dtype],
    tensor: Callable[[str], NDArray],
    max_shard_bytes: int,
) -> None:
    """Writes model.safetensors, or model-0000i-of-0000n.safetensors and their index.

    Args:
        folder: where to.
        shapes: name -> shape of every tensor, in the order in which they are written.
        dtype_of: dtype_of(name).
        tensor: tensor(name): asked for once, when it is written.
        max_shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.
    """
    sizes = {name: prod(shape) * dtype_of(name).itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write(folder / file, {name: shapes[name] for name in names}, dtype_of, tensor)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str], np.dtype],
    tensor: Callable[[str], NDArray],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    at = 0
    for name, shape in shapes.items():
        end = at + prod(shape) * dtype_of(name).itemsize
        header[name] = {"dtype": _NAMES[dtype_of(name)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            file.write(memoryview(np.ascontiguousarray(tensor(name)).reshape(-1).view(np.uint8)))
