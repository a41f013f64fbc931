"""Parameter trees, leaf by leaf: where each is in our tree, what it is called in files, and how it gets from there.

A family's tree is written down as the nested dict that its Flax module has, with a `Spec` for every leaf (see
`checkpoints.tables`). `leaves` gives every leaf its Hugging Face name by one rule:

    layers_3/self_attn/q_proj/kernel   ->   model.layers.3.self_attn.q_proj.weight

Module names are Hugging Face's wherever possible; a family lists those that differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from checkpoints.arrays import Meter, Task, aligned_arrays, run_tasks
from checkpoints.errors import MissingWeightsError
from checkpoints.placement import Index, Target, held_bytes, place, whole


@dataclass(frozen=True)
class Spec:
    """Shape of one leaf, and how files hold it."""

    shape: tuple[int, ...]
    """Shape in our tree."""

    transposed: bool = False
    """True: files hold [out, in] where we hold [in, out]."""

    stacked: bool = False
    """True: files hold one tensor for each index of our first axis."""


Tree = dict[str, "Spec | Tree"]
"""A parameter tree with a `Spec` in place of each array."""


@dataclass(frozen=True)
class Leaf:
    """One parameter of a model."""

    path: tuple[str, ...]
    """Where it is in our tree."""

    spec: Spec
    """Its shape, and how files hold it."""

    names: tuple[str, ...]
    """Hugging Face's name; names, if it is stacked."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in files."""
        shape = self.spec.shape[1:] if self.spec.stacked else self.spec.shape
        return shape[::-1] if self.spec.transposed else shape

    def as_stored(self) -> "Leaf":
        """A kernel that files hold the other way round, as they hold it: the `weight` of `jpaged.models.dense`."""
        if not self.spec.transposed or self.path[-1] != "kernel":
            return self
        return replace(self, path=(*self.path[:-1], "weight"), spec=Spec(self.stored_shape))


@dataclass(frozen=True)
class Names:
    """How a family's Hugging Face names differ from the paths in our tree."""

    prefix: str = "model."
    """Of everything but the head. Checkpoints that were saved without the head lack its first part."""

    modules: Mapping[str, str] = field(default_factory=dict)
    """Our name of a module -> theirs, where they differ."""

    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Patterns of tensors that old checkpoints hold and nobody needs."""

    def of(self, path: tuple[str, ...], stacked: int = 0) -> tuple[str, ...]:
        """The name of a leaf, or of its `stacked` parts."""
        parts = []
        for part in path:
            stem, _, number = part.rpartition("_")
            indexed = stem == "layers" and number.isdigit()
            parts += [self.modules.get(stem, stem), number] if indexed else [self.modules.get(part, part)]
        if parts[-1] in ("kernel", "scale", "embedding"):
            parts[-1] = "weight"
        prefix = "" if path[0] == "lm_head" else self.prefix
        if not stacked:
            return (prefix + ".".join(parts),)
        return tuple(prefix + ".".join([*parts[:-1], str(index), parts[-1], "weight"]) for index in range(stacked))


def leaves(tree: Tree, names: Names, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """All leaves of a tree, in its order."""
    for key, node in tree.items():
        here = (*path, key)
        if isinstance(node, Spec):
            yield Leaf(here, node, names.of(here, node.shape[0] if node.stacked else 0))
        else:
            yield from leaves(node, names, here)


def read_params(
    wanted: Iterable[Leaf], target: Target, tasks_of: Callable[[Leaf, Index, NDArray], Iterable[Task]]
) -> dict[str, Any]:
    """Makes all parameters: first those that stay on the host, then the others, shard by shard.

    Args:
        wanted: the model's leaves.
        target: their element type and where they go.
        tasks_of: given a leaf, a part of it and an array of the part's shape, the tasks that fill the array from a
            checkpoint.

    Returns:
        The tree. Its NumPy arrays are read-only, for JAX may share their memory.
    """
    wanted, dtype = [leaf.as_stored() if target.as_stored else leaf for leaf in wanted], target.dtype
    meter = Meter(sum(held_bytes(leaf.spec.shape, dtype) for leaf in wanted), target.progress)
    shardings = [target.sharding_of(leaf.path, leaf.spec.shape) for leaf in wanted]
    host = [leaf for leaf, sharding in zip(wanted, shardings, strict=True) if sharding is None]
    made: dict[tuple[str, ...], Any] = {}
    arrays = aligned_arrays((leaf.spec.shape for leaf in host), dtype)
    tasks = [t for leaf, array in zip(host, arrays, strict=True) for t in tasks_of(leaf, whole(array.shape), array)]
    run_tasks(tasks, meter)
    for leaf, array in zip(host, arrays, strict=True):
        array.flags.writeable = False
        made[leaf.path] = array
    for leaf, sharding in zip(wanted, shardings, strict=True):
        if sharding is not None:
            made[leaf.path] = place(
                leaf.spec.shape,
                dtype,
                sharding,
                lambda index, part, leaf=leaf: run_tasks(list(tasks_of(leaf, index, part)), meter),  # type: ignore[misc]
            )
    params: dict[str, Any] = {}
    for leaf in wanted:
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = made[leaf.path]
    return params


def check_tensors(source: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; raises `MissingWeightsError` with every difference."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    misshapen = [
        (name, shape, found[name]) for name, shape in expected.items() if name in found and found[name] != shape
    ]
    if missing or surplus or misshapen:
        raise MissingWeightsError(source, missing=missing, surplus=surplus, misshapen=misshapen)
