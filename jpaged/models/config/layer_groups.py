"""LayerGroups: layers that need the same blocks of a sequence share a block table."""

from collections.abc import Sequence
from typing import NamedTuple, Self


class LayerGroups(NamedTuple):
    """The layers of a model in groups of equal size, each of one kind of window. The last of a kind may be padded.

    A block belongs to one group at a time and holds what its layers keep of some tokens, so that all blocks are alike:
    one pool and one allocator serve layers that keep everything and layers that keep a window.
    """

    windows: tuple[int | None, ...]
    """Of each group; the one that sees furthest comes first. None: all tokens."""
    places: tuple[tuple[int, int], ...]
    """Of each layer: (its group, which of the group's layers it is)."""

    @property
    def size(self) -> int:
        """Layers of a group, its padding included."""
        return 1 + max(index for _, index in self.places)

    @classmethod
    def of(cls, windows: Sequence[int | None]) -> Self:
        """The groups of layers with such windows."""
        kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
        counts = [windows.count(kind) for kind in kinds]
        # As large as the rarest kind, so that little is padded; a kind that is hardly rarer is padded instead.
        size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
        groups: list[int | None] = []
        places = {}
        for kind, count in zip(kinds, counts, strict=True):
            # In turn: where layers alternate with a period, so do their places.
            first, number = len(groups), -(-count // size)
            for n, layer in enumerate(i for i, window in enumerate(windows) if window == kind):
                places[layer] = first + n % number, n // number
            groups += [kind] * number
        return cls(tuple(groups), tuple(places[layer] for layer in range(len(windows))))
