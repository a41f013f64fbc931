"""Which rows of a step begin with the same blocks, so that attention reads these once for all of them.

Of the layer groups, only the first is looked at: the one that sees furthest.

Samples of one prompt, beams, and requests with a common system prompt form a tree of shared blocks. Each row joins the
node of that tree at which most reading is saved:

    [ 1 2 3 4 ] 7        4 blocks x 1 row saved if rows 0 and 1 are read together,
    [ 1 2 3 4 ] 9        1 block x 2 rows if all three are: the pair wins.
    [ 1 ] 5 6
"""

from typing import NamedTuple

import numpy as np

from jpaged.memory import BlockManager

MEMBERS = 8
"""Rows that are read together at most, unless an engine says otherwise."""
MIN_SAVED_TOKENS = 512
"""A piece costs a few products and moves of its own: what is read less must be worth them."""


class Piece(NamedTuple):
    """Rows of the decode lane, and how many leading blocks they share."""

    members: list[int]
    num_blocks: int


def fewest_members(members: int) -> int:
    """Of a piece of at most so many rows: with fewer than half, its padding would cost what it saves."""
    return members // 2


class SharingFinder:
    """Finds the pieces of each step; nothing is looked for again until rows or tables have changed.

    Args:
      members: rows of a piece at most.
      min_saved_tokens: of reading, by a piece.
    """

    def __init__(self, blocks: BlockManager, members: int, *, min_saved_tokens: int = MIN_SAVED_TOKENS) -> None:
        self._blocks, self._members, self._min_saved_tokens = blocks, members, min_saved_tokens
        self._known: tuple[int, bytes] = (-1, b"")
        self._pieces: list[Piece] = []

    def find(self, rows: np.ndarray, positions: np.ndarray) -> list[Piece]:
        """The pieces of a decode lane (int32 [d] each), those that save most first."""
        known = self._blocks.version, rows.tobytes()
        if known != self._known:
            self._known, self._pieces = known, self._find(rows, positions)
        return self._pieces

    def _find(self, rows: np.ndarray, positions: np.ndarray) -> list[Piece]:
        blocks, least = self._blocks, fewest_members(self._members)
        full = positions // blocks.block_size  # blocks before the one that is written
        readers = blocks.allocator.refs[blocks.tables[rows, 0]]
        if len(rows):
            readers = readers * np.bincount(rows)[rows]  # a row with guesses has several lanes
        lanes = np.flatnonzero((readers > 1) & (full > 0) & (blocks.firsts[rows, 0] == 0))
        if len(lanes) < least:
            return []
        tables = blocks.by_group[rows[lanes], : full[lanes].max(), 0]
        pieces: list[Piece] = []
        for group, common in _split(tables, full[lanes], np.arange(len(lanes)))[1]:
            for start in range(0, len(group), self._members):
                members = lanes[group[start : start + self._members]].tolist()
                saved = (len(members) - 1) * common * blocks.block_size
                if len(members) >= least and saved >= self._min_saved_tokens:
                    pieces.append(Piece(members, common))
        return sorted(pieces, key=lambda piece: -(len(piece.members) - 1) * piece.num_blocks)


def _split(tables: np.ndarray, full: np.ndarray, group: np.ndarray, depth: int = 0) -> tuple[int, list]:
    """(blocks saved, [(rows, common blocks)]) of the best way to read rows that agree in `depth` blocks."""
    if len(group) < 2:
        return 0, []
    same = (tables[group] == tables[group[0]]).all(axis=0)
    common = int(same.argmin()) if not same.all() else tables.shape[1]
    common = max(min(common, int(full[group].min())), depth)
    together = (len(group) - 1) * common, [(group, common)] if common else []
    longer = group[full[group] > common]
    if len(longer) < 2:
        return together
    keys = tables[longer, common]
    apart = [_split(tables, full, longer[keys == key], common + 1) for key in np.unique(keys)]
    saved = sum(s for s, _ in apart)
    return (saved, [piece for _, pieces in apart for piece in pieces]) if saved > together[0] else together
