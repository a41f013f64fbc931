"""Parameter trees as others keep them: where in a tree they begin, which layout they are in, and ours made of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoints.arrays import aligned_arrays
from checkpoints.errors import UnsupportedCheckpointError
from checkpoints.layout_tables import ANCHORS, detect
from checkpoints.layouts import Layout, Path, Same, stored_shapes
from checkpoints.leaves import check_tensors
from jpaged.models.config import ModelConfig

_WRAPPERS = {"params", "model", "base", "state", "model_params", "transformer"}
"""What a parameter tree may be wrapped in; optimizer states hold trees that look the same."""

_BESIDE = {"rngs", "vision_encoder", "SigLiPFromPatches_0"}
"""What may lie in a parameter tree that is no part of a language model."""

_FUSED = ("gating_einsum", "linear")  # DeepMind's flat trees have another `w` below these

Keys = tuple[Any, ...]
"""Keys from the root of a tree to a leaf."""


def layout_of(config: ModelConfig, shapes: Mapping[Path, tuple[int, ...]], source: object) -> tuple[str, Layout]:
    """The layout of a tree: its name and table.

    Args:
        shapes: of all its arrays, by path, as `below_anchor` returns them.
        source: what errors call it.

    Raises:
        UnsupportedCheckpointError: the family has no such layout.
        MissingWeightsError: its arrays are not those that the configuration asks for.
    """
    found = dict(shapes)
    name, layout = detect(config, found)
    for link in layout:
        if link.padded is not None and link.key in found:
            whole, shape = stored_shapes([link])[link.key], list(found[link.key])
            if len(shape) == len(whole):
                shape[link.padded] = min(shape[link.padded], whole[link.padded])
            found[link.key] = tuple(shape)
    check_tensors(
        f"{source} ({name})",
        {"/".join(key): shape for key, shape in stored_shapes(layout).items()},
        {"/".join(key): shape for key, shape in found.items()},
    )
    return name, layout


def to_linen(config: ModelConfig, tree: Any) -> dict[str, Any]:
    """Our parameter tree, made of one in memory that MaxText, Tunix or DeepMind gemma trains: `LLM(to_linen=...)`.

        llm = LLM(model=config, params=tree, to_linen=functools.partial(checkpoints.to_linen, config))

    Args:
        tree: nested dicts and lists of JAX or NumPy arrays, bare or wrapped as in a checkpoint; of an NNX model,
            `nnx.to_pure_dict(nnx.state(model, nnx.Param))`. One in our own layout is fine too.

    Returns:
        Arrays on their devices where values are the same, rearranged there if they must be; arrays on the host where
        a layout scales its values.

    Raises: as `layout_of` and `below_anchor`.
    """
    stored = below_anchor("params", dict(flatten(tree)))
    _, layout = layout_of(config, {path: tuple(array.shape) for path, array in stored.items()}, "params")
    ours: dict[str, Any] = {}
    for link in layout:
        theirs = stored[link.key]
        if link.value == Same():
            put(ours, link.path, theirs if theirs.shape == link.shape and not link.axes else link.view(theirs))
        else:
            theirs = np.asarray(theirs)
            [leaf] = aligned_arrays([link.shape], theirs.dtype)
            link.decode(theirs, leaf, theirs.dtype)
            put(ours, link.path, leaf)
    return ours


def below_anchor[Array](source: object, stored: Mapping[Keys, Array]) -> dict[Path, Array]:
    """The arrays of the parameter tree in a larger one, by their paths in it; found by where its embedding is.

    Raises:
        UnsupportedCheckpointError: there is no parameter tree that jpaged knows.
    """
    prefixes = set()
    for keys in stored:
        bare = normal(keys)
        for anchor in ANCHORS:
            if bare[-len(anchor) :] == anchor and _WRAPPERS.issuperset(bare[: -len(anchor)]):
                prefixes.add(bare[: -len(anchor)])
    if not prefixes:
        tops = ", ".join(sorted({str(keys[0]) for keys in stored if keys})) or "nothing"
        raise UnsupportedCheckpointError(
            f"{source}: there is no {', '.join(map('/'.join, ANCHORS))} at its root or under "
            f"{', '.join(sorted(_WRAPPERS))}; it holds {tops}. jpaged reads the parameter trees of its own modules, of "
            "MaxText, Tunix and DeepMind gemma"
        )
    prefix = min(prefixes, key=len)
    below = {normal(keys): array for keys, array in stored.items()}
    tree = {path[len(prefix) :]: array for path, array in below.items() if path[: len(prefix)] == prefix}
    return {path: array for path, array in tree.items() if not _BESIDE & set(path)}


def normal(keys: Keys) -> Path:
    """As strings, split at slashes, without the `value` of NNX states and the `w` of DeepMind's flat trees."""
    path = tuple(part for key in keys for part in str(key).split("/"))
    path = path[:-1] if path[-1:] == ("value",) else path
    return path[:-1] if path[-1:] == ("w",) and path[-2:-1] and path[-2] in _FUSED else path


def flatten(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Leaves of nested dicts and lists, with their keys."""
    if isinstance(tree, dict):
        for key, node in tree.items():
            yield from flatten(node, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, node in enumerate(tree):
            yield from flatten(node, (*path, index))
    else:
        yield path, tree


def put(tree: dict[Any, Any], path: Keys, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
