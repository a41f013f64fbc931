"""A GGUF file's tensors -> parameter tree."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import TILE, Meter, Task, copy_cast, expand, run_tasks
from checkpoints.errors import UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile, GGUFTensor
from checkpoints.gguf_architectures import Architecture
from checkpoints.gguf_config import ROPE_DIVISORS, architecture_of
from checkpoints.leaves import Leaf, check_tensors, read_params
from checkpoints.placement import Index, Target, whole
from checkpoints.tables import leaves_of
from jpaged.models.config import ModelConfig


def params_from_gguf(file: GGUFFile, config: ModelConfig, target: Target) -> dict[str, Any]:
    """Dequantises, transposes and casts all tensors into the tree of `checkpoints.tables`.

    Returns:
        Nested dict of arrays, see `Checkpoint.params`.

    Raises:
        MissingWeightsError: the file's tensors are not those that `config` asks for.
        UnsupportedCheckpointError: a quantised norm or bias.
    """
    wanted, architecture = list(leaves_of(config)), architecture_of(file)
    check_tensors(
        str(file.path),
        {architecture.name(leaf.path): leaf.stored_shape for leaf in wanted},
        {name: tensor.shape for name, tensor in file.tensors.items() if name != ROPE_DIVISORS},
    )
    tasks = partial(_tasks, file, architecture, config)

    def tasks_of(leaf: Leaf, index: Index, array: NDArray) -> Iterator[Task]:
        if index == whole(leaf.spec.shape):
            yield from tasks(leaf, array)
        else:  # a shard's edges may lie inside packed blocks: expand all of the tensor, keep the shard
            everything = np.empty(leaf.spec.shape, array.dtype)
            run_tasks(list(tasks(leaf, everything)), Meter(0, None))
            yield Task(architecture.name(leaf.path), array.nbytes, partial(np.copyto, array, everything[index]))

    return read_params(wanted, target, tasks_of)


def half_rotation_order(heads: int, width: int) -> NDArray[np.intp]:
    """Which row of llama.cpp's q or k is each row of ours: intp [width], width = heads * head_dim.

    For Llama, llama.cpp rotates neighbours, (2i, 2i + 1); Hugging Face rotates halves, (i, i + D/2). Its converter
    therefore moves row s * D/2 + i of every head to 2i + s; here is the way back.
    """
    return np.arange(width).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _tasks(
    file: GGUFFile, architecture: Architecture, config: ModelConfig, leaf: Leaf, array: NDArray
) -> Iterator[Task]:
    """Cuts one tensor into ranges of rows of about `TILE` to 1 M weights."""
    tensor = file.tensors[architecture.name(leaf.path)]
    raw = file.rows(tensor)
    if len(tensor.shape) == 1:
        if tensor.type.dtype is None:
            raise UnsupportedCheckpointError(f"{file.path}: {tensor.name!r} is a quantised vector ({tensor.type.name})")
        raw, array = raw.reshape(tensor.shape[0], -1), array[:, None]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf.path[-2], 0)
    order = half_rotation_order(heads, len(raw)) if architecture.rotates_neighbours and heads else None
    offset = architecture.norm_offset if leaf.path[-1] == "scale" else 0
    if leaf.spec.transposed:  # lanes = rows: as many as fill a tile with one block each
        step = max(64, TILE // tensor.type.block_size) if tensor.type.dtype is None else 512
    else:
        step = max(1, (1 << 20) // prod(tensor.shape[1:]))
    for start in range(0, len(raw), step):
        rows = slice(start, min(start + step, len(raw)))
        target = array[:, rows] if leaf.spec.transposed else array[rows]
        yield _task(file, tensor, raw, rows, order, target, leaf.spec.transposed, offset)


def _task(
    file: GGUFFile,
    tensor: GGUFTensor,
    raw: NDArray[np.uint8],
    rows: slice,
    order: NDArray[np.intp] | None,
    target: NDArray,
    transposed: bool,
    offset: int,
) -> Task:
    """Fills `target` with some rows of a tensor, less `offset`; with `order`, with the rows that belong there."""
    start, nbytes = rows.start * raw.shape[1], raw[rows].size

    def run() -> None:
        packed = raw[rows if order is None else order[rows]]
        if tensor.type.dtype is None:
            expand(packed, tensor.type, target, transpose=transposed)
        else:
            values = packed.view(tensor.type.dtype)
            values = values.astype(np.float32) - offset if offset else values
            copy_cast(values.T if transposed else values, target)
        file.release(tensor, start, nbytes)  # keeps the resident set near the size of the parameters

    return Task(tensor.name, target.nbytes, run)
