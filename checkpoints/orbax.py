"""An Orbax directory that holds a parameter tree, in whatever layout -> configuration and parameter tree.

The tree may be saved bare, as `params` of a Linen `TrainState`, or as an NNX state whose leaves end in `value`; by
`CheckpointManager`, `StandardCheckpointer`, `PyTreeCheckpointer` or Orbax v1; it may be ours, MaxText's, Tunix's or
DeepMind gemma's (`checkpoints.layout_tables`). Only the parameters are read. What Orbax does not know, jpaged takes
from a Hugging Face `config.json` in the directory or in one of the two above it.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import DTYPES, Meter, aligned_arrays
from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from checkpoints.layouts import Layout, Link, Same, by_key
from checkpoints.placement import Index, Target, held_bytes, place
from checkpoints.trees import Keys, below_anchor, flatten, layout_of, put
from jpaged.models.config import ModelConfig

_MARK = "_CHECKPOINT_METADATA"
_ITEM = "_METADATA"


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint."""

    keys: Keys
    """Where it is, in Orbax's tree."""

    shape: tuple[int, ...]
    """Its shape."""

    dtype: np.dtype
    """Its element type."""


def find_checkpoint(path: Path) -> Path | None:
    """The Orbax checkpoint that a directory is, belongs to, or holds as its latest step; None if there is none."""
    if (path / _MARK).is_file():
        return path
    if (path / _ITEM).is_file() and (path.parent / _MARK).is_file():  # an item of a step: Orbax wants the step
        return path.parent
    steps = [child for child in path.iterdir() if child.name.isdecimal() and (child / _MARK).is_file()]
    return max(steps, key=lambda step: int(step.name), default=None)


def config_folder(checkpoint: Path) -> Path:
    """The folder with the checkpoint's config.json.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointNotFoundError(
        f"{checkpoint}: Orbax keeps arrays only; put the model's config.json (Hugging Face's spelling) beside them"
    )


class OrbaxParams:
    """The parameters of a model in an Orbax checkpoint.

    Attributes:
        layout_name: what kind of tree it is.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config

    @cached_property
    def _opened(self) -> tuple[str, Layout, Mapping[tuple[str, ...], Stored]]:
        """The layout's name, its table, and what is stored under its keys."""
        stored = below_anchor(self._checkpoint, {array.keys: array for array in _metadata(self._checkpoint)})
        shapes = {key: array.shape for key, array in stored.items()}
        name, layout = layout_of(self._config, shapes, self._checkpoint)
        return name, layout, stored

    @property
    def layout_name(self) -> str:
        return self._opened[0]

    def dtype(self) -> np.dtype:
        """The commonest element type of the parameters whose values are stored as they are."""
        _, layout, stored = self._opened
        bytes_of: Counter[np.dtype] = Counter()
        for link in layout:
            if link.value == Same():
                bytes_of[stored[link.key].dtype] += held_bytes(link.shape, stored[link.key].dtype)
        [(dtype, _)] = bytes_of.most_common(1)
        return dtype if dtype in DTYPES.values() else DTYPES["float32"]

    def read(self, target: Target) -> dict[str, Any]:
        """Reads the parameters, cast on the way, to where they go: a few arrays at a time, the largest first.

        Returns:
            Nested dict of arrays, see `Checkpoint.params`.

        Raises:
            CorruptCheckpointError: Orbax cannot read it.
            UnsupportedCheckpointError: there is no parameter tree in it that jpaged knows.
            MissingWeightsError: its parameters are not those that the configuration asks for.
        """
        (_, layout, stored), native = self._opened, self.dtype()
        meter = Meter(sum(held_bytes(link.shape, target.dtype) for link in layout), target.progress)
        groups, made = by_key(layout), {}
        for batch in _batches({key: stored[key] for key in groups}):
            arrays = _load(self._checkpoint, [stored[key] for key in batch])
            for key in batch:
                theirs = arrays.pop(stored[key].keys)
                for link in groups[key]:
                    made[link.path] = _make(link, theirs, native, target)
                    meter.advance(held_bytes(link.shape, target.dtype), "/".join(link.path))
        params: dict[str, Any] = {}
        for link in layout:
            put(params, link.path, made[link.path])
        return params


def _make(link: Link, theirs: NDArray, native: np.dtype, target: Target) -> Any:
    """One parameter, on the host or on its devices."""
    sharding = target.sharding_of(link.path, link.shape)
    if sharding is not None and link.value == Same():
        view = link.view(theirs)

        def fill(index: Index, part: NDArray) -> None:
            np.copyto(part, view[index], casting="unsafe")

        return place(link.shape, target.dtype, sharding, fill)
    [ours] = aligned_arrays([link.shape], target.dtype)
    link.decode(theirs, ours, native)
    if sharding is not None:
        return place(link.shape, target.dtype, sharding, lambda index, part: np.copyto(part, ours[index]))
    ours.flags.writeable = False
    return ours


def _batches(stored: Mapping[tuple[str, ...], Stored]) -> Iterator[list[tuple[str, ...]]]:
    """Keys in the order of falling size, in batches of a sixteenth of all bytes, or of one larger array.

    What is read is held twice until its parameters are made. So the large arrays are read while little is there yet.
    """
    sizes = {key: prod(array.shape) * array.dtype.itemsize for key, array in stored.items()}
    budget, held = sum(sizes.values()) // 16, 0
    batch: list[tuple[str, ...]] = []
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if batch and held + sizes[key] > budget:
            yield batch
            batch, held = [], 0
        batch.append(key)
        held += sizes[key]
    yield batch


def _metadata(checkpoint: Path) -> list[Stored]:
    """Everything that is stored."""
    from orbax.checkpoint import v1

    try:
        with quiet():
            tree = v1.metadata(checkpoint.absolute()).metadata
    except Exception as error:  # whatever Orbax, TensorStore and json raise
        raise CorruptCheckpointError(f"{checkpoint}: Orbax cannot read its metadata ({first_line(error)})") from error
    arrays = [(path, leaf) for path, leaf in flatten(tree) if getattr(leaf, "shape", None) is not None]
    if not arrays:
        raise CorruptCheckpointError(f"{checkpoint}: Orbax finds no arrays in it; was it saved to the end?")
    return [Stored(path, tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in arrays]


def _load(checkpoint: Path, wanted: Sequence[Stored]) -> dict[Keys, NDArray]:
    """Reads some arrays and nothing else."""
    from orbax.checkpoint import v1

    abstract: dict[Any, Any] = {}
    for array in wanted:  # a NumPy array asks for a NumPy array; this one takes no memory
        put(abstract, array.keys, np.broadcast_to(np.zeros((), array.dtype), array.shape))
    context = v1.Context()
    context.pytree.loading.partial_load = True
    try:
        with context, quiet():
            loaded = v1.load(checkpoint.absolute(), abstract)
    except Exception as error:  # as above
        raise CorruptCheckpointError(f"{checkpoint}: Orbax cannot read it ({first_line(error)})") from error
    found = {array.keys: _get(loaded, array.keys) for array in wanted}
    # Under partial loading a leaf that is missing comes back as it was asked for, without an error.
    hollow = [keys for keys, array in found.items() if type(array) is not np.ndarray or 0 in array.strides]
    if hollow:
        raise CorruptCheckpointError(
            f"{checkpoint}: Orbax did not read {', '.join('/'.join(map(str, keys)) for keys in hollow)}"
        )
    return found


def _get(tree: Any, path: Keys) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs every step of its work."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def save_tree(folder: Path, arrays: Mapping[Keys, Any], name: str) -> None:
    """Writes an Orbax v1 checkpoint of a nested dict, given as keys -> array, NumPy or JAX, under a name.

    Raises:
        CheckpointError: Orbax cannot write it.
    """
    from orbax.checkpoint import v1

    tree: dict[Any, Any] = {}
    for keys, array in arrays.items():
        put(tree, keys, array)
    try:
        with quiet():
            v1.save(folder.absolute(), tree, checkpointable_name=name)
    except Exception as error:  # whatever Orbax and TensorStore raise
        raise CheckpointError(f"{folder}: Orbax cannot write it ({first_line(error)})") from error
