"""An Orbax directory that holds a Linen parameter tree -> configuration and parameter tree.

The tree may be saved bare, as `params` of a Linen `TrainState`, or as an NNX state whose leaves end in `value`; by
`CheckpointManager`, `StandardCheckpointer`, `PyTreeCheckpointer` or Orbax v1. Only the parameters are read. What Orbax
does not know, jpaged takes from a Hugging Face `config.json` in the directory or in one of the two above it.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.leaves import check_tensors
from checkpoints.placement import Target, held_bytes
from checkpoints.tables import leaves_of
from jpaged.models.config import ModelConfig

_MARK = "_CHECKPOINT_METADATA"
_ITEM = "_METADATA"
_WRAPPERS = {"params", "model", "base", "state", "model_params"}
"""What a parameter tree may be wrapped in; optimizer states hold trees that look the same."""

Keys = tuple[Any, ...]
"""Keys from the root of a tree to a leaf."""


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


def params_from_orbax(checkpoint: Path, config: ModelConfig, target: Target) -> dict[str, Any]:
    """Reads the parameters, cast on the way, to where they go; onto the default device if nothing is said.

    Returns:
        Nested dict of JAX arrays of `dtype`: the tree of `checkpoints.tables`.

    Raises:
        CorruptCheckpointError: Orbax cannot read it.
        UnsupportedCheckpointError: there is no parameter tree of ours in it.
        MissingWeightsError: its parameters are not those that `config` asks for.
    """
    stored = _metadata(checkpoint)
    wanted = {leaf.path: leaf.spec.shape for leaf in leaves_of(config)}
    prefix = _find_params(checkpoint, stored, next(iter(wanted)))
    ours = {_normal(path[len(prefix) :]): path for path in stored if path[: len(prefix)] == prefix}
    check_tensors(
        str(checkpoint),
        {"/".join(path): shape for path, shape in wanted.items()},
        {"/".join(path): stored[whole] for path, whole in ours.items()},
    )
    shardings = {ours[path]: target.sharding_of(path, shape) for path, shape in wanted.items()}
    loaded = _load(checkpoint, {ours[path]: shape for path, shape in wanted.items()}, target.dtype, shardings)
    params: dict[str, Any] = {}
    for path in wanted:
        _put(params, path, _get(loaded, ours[path]))
    if target.progress is not None:
        total = sum(held_bytes(shape, target.dtype) for shape in wanted.values())
        target.progress(total, total, checkpoint.name)
    return params


def _metadata(checkpoint: Path) -> dict[Keys, tuple[int, ...]]:
    """Path -> shape of everything that is stored."""
    from orbax.checkpoint import v1

    try:
        with _quiet():
            tree = v1.metadata(checkpoint.absolute()).metadata
    except Exception as error:  # whatever Orbax, TensorStore and json raise
        raise CorruptCheckpointError(f"{checkpoint}: Orbax cannot read its metadata ({_first_line(error)})") from error
    return {path: tuple(leaf.shape) for path, leaf in _flatten(tree) if getattr(leaf, "shape", None) is not None}


def _load(checkpoint: Path, shapes: dict[Keys, tuple[int, ...]], dtype: np.dtype, shardings: dict[Keys, Any]) -> Any:
    """Reads the named leaves and nothing else."""
    import jax
    from orbax.checkpoint import v1

    abstract: dict[Any, Any] = {}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for path, shape in shapes.items():
        _put(abstract, path, jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path] or default))
    context = v1.Context()
    context.pytree.loading.partial_load = True
    try:
        with context, _quiet():
            loaded = v1.load(checkpoint.absolute(), abstract)
    except Exception as error:  # as above
        raise CorruptCheckpointError(f"{checkpoint}: Orbax cannot read it ({_first_line(error)})") from error
    # Under partial loading a leaf that is missing comes back as it was asked for, without an error.
    hollow = ["/".join(map(str, path)) for path in shapes if not isinstance(_get(loaded, path), jax.Array)]
    if hollow:
        raise CorruptCheckpointError(f"{checkpoint}: Orbax did not read {', '.join(hollow)}")
    return loaded


def _find_params(checkpoint: Path, stored: dict[Keys, tuple[int, ...]], first: tuple[str, ...]) -> Keys:
    """The path of the parameter tree, by where its first leaf is."""
    found = []
    for path in stored:
        bare = _normal(path)
        if bare[-len(first) :] == first and _WRAPPERS.issuperset(bare[: -len(first)]):
            found.append(path[: len(bare) - len(first)])
    if not found:
        tops = ", ".join(sorted({str(path[0]) for path in stored})) or "nothing"
        raise UnsupportedCheckpointError(
            f"{checkpoint}: there is no {'/'.join(first)} at its root or under {', '.join(sorted(_WRAPPERS))}; "
            f"it holds {tops}. It must be the parameter tree of a module of jpaged.models"
        )
    return min(found, key=len)


def _normal(path: Keys) -> tuple[str, ...]:
    """As strings, without the `value` that an NNX state ends its paths with."""
    keys = tuple(map(str, path))
    return keys[:-1] if keys[-1:] == ("value",) else keys


def _flatten(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(tree, dict):
        for key, node in tree.items():
            yield from _flatten(node, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, node in enumerate(tree):
            yield from _flatten(node, (*path, index))
    else:
        yield path, tree


def _put(tree: dict[Any, Any], path: Keys, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Any, path: Keys) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every step of its work."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
