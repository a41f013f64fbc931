"""Which part of which row each program of a decode kernel works on: flash-decoding with even shares.

A batch whose rows are 100, 100 and 100,000 tokens long keeps a GPU busy only if the long row is cut finer than the
short ones. So the whole batch's tiles are dealt out: all of them together, divided by the number of programs wanted,
give the share of one program, and a row takes as many programs ("items") as it has shares. The list is made on the
device, from the lengths, once per step: every layer makes the same list, and XLA keeps one of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Splits(NamedTuple):
    """The work list. Items of one row are neighbours, in the order of the row's tokens."""

    items: jax.Array  # int32 [N, 5]: row (-1: nothing to do), first tile, tile after the last, split, splits of the row
    rows: jax.Array  # int32 [R, 2]: the row's first item, and how many it has (at least one)


def num_items(rows: int, *, width_tiles: int, programs: int, fewest: int, fixed: int | None) -> int:
    """Upper bound of the items of `plan_splits`, known before the lengths are."""
    most = most_items(width_tiles=width_tiles, programs=programs, fewest=fewest, fixed=fixed)
    return rows * most if fixed is not None else min(rows * most, rows + programs)


def most_items(*, width_tiles: int, programs: int, fewest: int, fixed: int | None) -> int:
    """Upper bound of the items of one row."""
    finest = max(1, -(-width_tiles // (fewest if fixed is None else fixed)))
    return finest if fixed is not None else min(finest, programs)


def plan_splits(
    begin: jax.Array, end: jax.Array, *, tile: int, width_tiles: int, programs: int, fewest: int, fixed: int | None
) -> Splits:
    """Deals the tiles that rows see out to programs.

    Args:
      begin, end: int32 [R]: row r sees the positions begin[r] <= p < end[r].
      tile: tokens in a tile. Tiles are counted from position 0.
      width_tiles: tiles of the longest row that the block tables could hold.
      programs: items wanted; a row's last item may be small, so up to R more are made.
      fewest: tiles below which cutting a row costs more than it brings.
      fixed: tiles of an item whatever the batch is: how a row is cut then depends on nothing but its own length.
    """
    first = begin // tile
    tiles = jnp.where(end > begin, -(-end // tile) - first, 0)  # [R]
    share = jnp.int32(fixed) if fixed is not None else jnp.maximum(-(-tiles.sum() // programs), fewest)
    splits = jnp.maximum(-(-tiles // share), 1)  # a row that sees nothing has one item, which writes its zeros
    last_item = jnp.cumsum(splits)
    count = num_items(begin.shape[0], width_tiles=width_tiles, programs=programs, fewest=fewest, fixed=fixed)
    item = jnp.arange(count, dtype=jnp.int32)
    row = (last_item <= item[:, None]).sum(-1, dtype=jnp.int32)  # [N]
    real = row < begin.shape[0]
    row = jnp.where(real, row, 0)
    split = item - (last_item - splits)[row]
    start = first[row] + split * share
    stop = jnp.minimum(start + share, (first + tiles)[row])
    items = jnp.stack([jnp.where(real, row, -1), start, stop, split, splits[row]], axis=-1)
    return Splits(items.astype(jnp.int32), jnp.stack([last_item - splits, splits], axis=-1).astype(jnp.int32))
