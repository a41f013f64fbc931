"""What a layout of a parameter tree is: for each leaf of ours, its place in theirs. One table, read in both directions.

    theirs[key][at] = encode(ours[path].reshape(split).transpose(axes))
    ours[path] = decode(theirs[key][at]).transpose(axes^-1).reshape(shape)

Several leaves may share one array of theirs: stacked layers, fused projections. The tables are in
`checkpoints.layout_tables`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Path = tuple[str, ...]
"""Keys from the root of a tree to a leaf."""

Place = tuple[int | None, ...]
"""An index: numbers, and None for a whole dimension; dimensions behind the last are whole."""

_BLOCK = 1 << 20  # weights

_WIDER: dict[np.dtype, np.dtype] = {
    np.dtype(np.float32): np.dtype(np.float64),
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.float32),
}


class Value(Protocol):
    """How values differ. Both functions keep the shape; numbers are computed in float64."""

    def encode(self, ours: NDArray) -> NDArray:
        """Ours -> theirs."""
        ...

    def decode(self, theirs: NDArray) -> NDArray:
        """Theirs -> ours."""
        ...

    def stored(self, dtype: np.dtype) -> np.dtype:
        """The element type that keeps all bits of ours of this type."""
        ...


@dataclass(frozen=True)
class Same:
    """Theirs are ours."""

    def encode(self, ours: NDArray) -> NDArray:
        return ours

    def decode(self, theirs: NDArray) -> NDArray:
        return theirs

    def stored(self, dtype: np.dtype) -> np.dtype:
        return dtype


@dataclass(frozen=True)
class Scaled:
    """Theirs are ours times a factor. Products by other factors than powers of two are rounded: in their own element
    type several of ours would become one of theirs. So theirs are stored in the next wider type, and the quotient,
    rounded once, is ours again. Readers cast."""

    factor: float

    def encode(self, ours: NDArray) -> NDArray:
        return ours.astype(np.float64) * self.factor

    def decode(self, theirs: NDArray) -> NDArray:
        return theirs.astype(np.float64) / self.factor

    def stored(self, dtype: np.dtype) -> np.dtype:
        exact = math.frexp(self.factor)[0] == 0.5
        return dtype if exact else _WIDER.get(dtype, dtype)


@dataclass(frozen=True)
class Plus:
    """Theirs are ours plus a number, in float64: exact for all ours but those below 1e-9 in size (float32)."""

    number: float

    def encode(self, ours: NDArray) -> NDArray:
        return ours.astype(np.float64) + self.number

    def decode(self, theirs: NDArray) -> NDArray:
        return theirs.astype(np.float64) - self.number

    def stored(self, dtype: np.dtype) -> np.dtype:
        return np.dtype(np.float64)


@dataclass(frozen=True)
class Interleaved:
    """Along the last axis: the halves of ours take turns in theirs, which rotates neighbours (2i, 2i + 1)."""

    then: Value = Same()

    def encode(self, ours: NDArray) -> NDArray:
        pairs = ours.reshape(*ours.shape[:-1], 2, -1).swapaxes(-1, -2)
        return self.then.encode(pairs.reshape(ours.shape))

    def decode(self, theirs: NDArray) -> NDArray:
        theirs = self.then.decode(theirs)
        return theirs.reshape(*theirs.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(theirs.shape)

    def stored(self, dtype: np.dtype) -> np.dtype:
        return self.then.stored(dtype)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One leaf of ours and its place in theirs."""

    path: Path
    """Ours."""

    shape: tuple[int, ...]
    """Its shape."""

    key: Path
    """Theirs."""

    at: Place = ()
    """Where in their array."""

    split: tuple[int, ...] = ()
    """Our shape with heads apart; empty: as it is."""

    axes: tuple[int, ...] = ()
    """Which of our split axes each of theirs is; empty: in order."""

    value: Value = Same()
    """How the values differ."""

    padded: int | None = None
    """The axis along which theirs may be longer than ours."""

    pad_to: int = 0
    """How long we make it."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part of their array that is this leaf."""
        split = self.split or self.shape
        return tuple(split[axis] for axis in self.axes) if self.axes else split

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where in their array, and without padding."""
        index = [slice(None) if number is None else number for number in self.at]
        part = self.part_shape
        index += [slice(None)] * (len(part) + sum(n is not None for n in self.at) - len(index))
        if self.padded is not None:
            whole = [position for position, number in enumerate(index) if isinstance(number, slice)]
            index[whole[self.padded]] = slice(0, part[self.padded])
        return tuple(index)

    def view(self, theirs: NDArray) -> NDArray:
        """Their array -> our leaf as it stands there; only where values are the same."""
        part = theirs[self.index]
        return (part.transpose(np.argsort(self.axes)) if self.axes else part).reshape(self.shape)

    def decode(self, theirs: NDArray, ours: NDArray, native: np.dtype) -> None:
        """Their array -> our leaf, cast.

        native: the tree's own element type. Where theirs is the wider one that keeps it, what was rounded is undone by
            rounding to it.
        """
        rounded = theirs.dtype == self.value.stored(native) != native
        self._convert(
            lambda part: self.value.decode(part).astype(native) if rounded else self.value.decode(part),
            theirs[self.index],
            self._part_of(ours),
        )

    def encode(self, ours: NDArray, theirs: NDArray) -> None:
        """Our leaf -> its part of their array."""
        self._convert(self.value.encode, self._part_of(ours), theirs[self.index])

    def _part_of(self, ours: NDArray) -> NDArray:
        """Our leaf, C-contiguous, with their axes."""
        part = ours.reshape(self.split or self.shape)
        return part.transpose(self.axes) if self.axes else part

    @staticmethod
    def _convert(convert: Callable[[NDArray], NDArray], source: NDArray, target: NDArray) -> None:
        """A few rows at a time, for they pass through float64."""
        step = max(1, _BLOCK // max(1, source[:1].size))
        for start in range(0, len(source), step):
            np.copyto(target[start : start + step], convert(source[start : start + step]), casting="unsafe")


Layout = Sequence[Link]
"""Every leaf of a model, once."""


def stored_shapes(layout: Layout) -> dict[Path, tuple[int, ...]]:
    """Key -> shape of every array of theirs, without padding."""
    shapes: dict[Path, tuple[int, ...]] = {}
    for link in layout:
        part, found = iter(link.part_shape), list(shapes.get(link.key, ()))
        whole = len(link.part_shape) + sum(number is not None for number in link.at)
        shape = [
            next(part) if number is None else number + 1 for number in (*link.at, *[None] * (whole - len(link.at)))
        ]
        shapes[link.key] = tuple(max(pair) for pair in zip(shape, found, strict=True)) if found else tuple(shape)
    return shapes


def by_key(layout: Layout) -> dict[Path, list[Link]]:
    """Key of theirs -> the leaves in it."""
    groups: dict[Path, list[Link]] = {}
    for link in layout:
        groups.setdefault(link.key, []).append(link)
    return groups


def encode(links: Iterable[Link], shape: tuple[int, ...], leaf: Callable[[Path], NDArray]) -> NDArray:
    """One array of theirs from our leaves.

    Args:
        links: all leaves in it.
        shape: its shape without padding.
        leaf: leaf(path): one of ours.
    """
    links = list(links)
    leaves = [np.asarray(leaf(link.path)) for link in links]
    padding = {link.padded: link.pad_to for link in links if link.padded is not None}
    padded = tuple(max(size, padding.get(axis, 0)) for axis, size in enumerate(shape))
    if padded == shape and links[0].value == Same() and not links[0].axes and not links[0].at:
        return leaves[0].reshape(shape)
    theirs = np.zeros(padded, links[0].value.stored(leaves[0].dtype))
    for link, array in zip(links, leaves, strict=True):
        link.encode(array, theirs)
    return theirs
