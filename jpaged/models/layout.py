"""PagedLayout: where a paged forward pass finds and puts keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import SharedPrefixes


class PagedLayout(NamedTuple):
    """The memory side of one paged forward pass over T = R + P * C tokens.

    The tokens are those of the decode lane (R rows, one token each) followed by those of the prefill lane
    (P tiles of C tokens). A tile's tokens are consecutive positions of one sequence; a long chunk of a prompt
    is several tiles. All K and V of a step are written before any of them is read, so tiles of one sequence
    see each other.
    """

    slots: jax.Array  # int32 [T]: block * block_size + offset, where each token's K and V go
    decode_tables: jax.Array  # int32 [R, W]: block tables
    decode_lengths: jax.Array  # int32 [R]: tokens to attend to, the row's own included; 0 for padding
    prefill_tables: jax.Array  # int32 [P, W]
    prefill_starts: jax.Array  # int32 [P]: position of the tile's first token
    prefill_lengths: jax.Array  # int32 [P]: real tokens of the tile; 0 for padding
    decode_shared: SharedPrefixes | None = None
    """Which rows of the decode lane begin with the same blocks."""

    def of_layer(self, index: int) -> tuple[int, "PagedLayout"]:
        """(which of the pool's arrays a layer has, the layout for it): each has its own, and one layout serves all."""
        return index, self

    @property
    def num_decodes(self) -> int:
        return self.decode_tables.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.prefill_tables.shape[0]


class GroupedLayout:
    """The layouts of a forward pass whose layers are divided into groups.

    Args:
      places: of each layer, see `LayerGroups`.
      layouts: of each group.
    """

    def __init__(self, places: Sequence[tuple[int, int]], layouts: Sequence[PagedLayout]) -> None:
        self._places, self._layouts = places, layouts

    def of_layer(self, index: int) -> tuple[int, PagedLayout]:
        """(which of the pool's arrays a layer has, the layout for it)."""
        group, array = self._places[index]
        return array, self._layouts[group]


class Tap:
    """In a layout's place: attention hands over what it was given, and returns what it is told to.

    Args:
      out: what attention returns, [T, Hq, Dv]; None: zeros.
    """

    def __init__(self, out: jax.Array | None = None) -> None:
        self.out = out

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, **options: Any) -> jax.Array:
        self.q, self.k, self.v, self.sinks, self.options = q, k, v, sinks, options
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype) if self.out is None else self.out
