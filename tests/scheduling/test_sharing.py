"""Which rows are read together: against every way to do it, on small trees of shared blocks."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from jpaged.memory import BlockManager
from jpaged.scheduling.sharing import SharingFinder, _split


def partitions(items):
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]


def saved_by(groups, tables, full):
    total = 0
    for group in groups:
        same = (tables[group] == tables[group[0]]).all(axis=0)
        common = int(same.argmin()) if not same.all() else tables.shape[1]
        total += (len(group) - 1) * min(common, int(full[group].min()))
    return total


@st.composite
def trees(draw):
    """Tables as forks make them: rows that differ at a block differ in all that follow."""
    width, count = 5, draw(st.integers(2, 5))
    tables, fresh = np.zeros((count, width), int), iter(range(1, 1000))
    for row in range(count):
        parent, common = draw(st.integers(0, row)), draw(st.integers(0, width))
        tables[row] = [next(fresh) for _ in range(width)]
        if parent < row:
            tables[row, :common] = tables[parent, :common]
    return tables, np.array(draw(st.lists(st.integers(1, width), min_size=count, max_size=count)))


@given(trees())
@settings(max_examples=200)
def test_equal_rows_are_together_where_most_is_saved(tree):
    tables, full = tree
    rows = np.arange(len(tables))
    saved, groups = _split(tables, full, rows)
    assert saved == saved_by([g.tolist() for g, _ in groups], tables, full)
    # The tree's nodes are what is chosen from: never worse than all together, or by the first block alone.
    assert saved >= saved_by([rows.tolist()], tables, full)
    by_first = [np.flatnonzero(tables[:, 0] == key).tolist() for key in np.unique(tables[:, 0])]
    assert saved >= saved_by(by_first, tables, full)
    assert saved <= max(saved_by(p, tables, full) for p in partitions(rows.tolist()))
    for group, common in groups:
        assert (tables[group, :common] == tables[group[0], :common]).all()
        assert (full[group] >= common).all()
    members = [row for group, _ in groups for row in group.tolist()]
    assert len(set(members)) == len(members)


def test_pieces_are_found_again_only_after_rows_or_tables_have_changed():
    blocks = BlockManager(60, 4, 12, 8)
    finder = SharingFinder(blocks, members=4, min_saved_tokens=1)
    blocks.try_open([0], [list(range(17))])
    for row in range(1, 10):
        blocks.fork(0, row)
    blocks.try_open([10], [list(range(100, 110))])
    rows, positions = np.arange(11, dtype=np.int32), np.full(11, 16, np.int32)
    pieces = finder.find(rows, positions)
    assert [(p.members, p.num_blocks) for p in pieces] == [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4), ([8, 9], 4)]
    assert finder.find(rows, positions + 1) is pieces
    blocks.close(9)
    assert [p.members for p in finder.find(rows[:9], positions[:9])] == [[0, 1, 2, 3], [4, 5, 6, 7]], (
        "one row alone is no piece"
    )
    assert finder.find(rows[1:3], positions[1:3])[0].members == [0, 1], "places in the lane, not rows"


def test_what_is_not_worth_a_piece_is_read_by_each():
    blocks = BlockManager(60, 4, 12, 8)
    blocks.try_open([0], [list(range(17))])
    for row in (1, 2, 3):
        blocks.fork(0, row)
    rows, positions = np.arange(4, dtype=np.int32), np.full(4, 16, np.int32)
    assert len(SharingFinder(blocks, members=8, min_saved_tokens=48).find(rows, positions)) == 1
    assert SharingFinder(blocks, members=8, min_saved_tokens=49).find(rows, positions) == []
    assert SharingFinder(blocks, members=10, min_saved_tokens=1).find(rows, positions) == [], "four are not half of ten"
    assert SharingFinder(blocks, members=4, min_saved_tokens=1).find(rows, positions % 4) == [], "no full block yet"
