"""SwapSpace: each block leaves once, comes back shared as it was, and room is counted. At random:
test_block_manager_machine.py."""

import numpy as np

from jpaged.memory import BlockManager, SwapSpace


def three_sharers(capacity):
    """Rows 0 to 2 share two full blocks; two of them share a third, and the last has one of its own."""
    blocks = BlockManager(12, 4, 4, 6)
    blocks.try_open([0], [list(range(10))])
    blocks.fork(0, 1)
    blocks.fork(0, 2)
    rows = np.array([2], np.int32)
    blocks.make_writable(blocks.writes(rows, np.array([10], np.int32)))
    return blocks, SwapSpace(blocks, capacity)


def test_each_block_leaves_once_and_comes_back_shared():
    blocks, space = three_sharers(capacity=4)
    before = blocks.tables[:3, :3].copy()
    swapped = space.try_out([0, 1, 2], [10, 10, 11])
    assert (swapped.blocks.tolist(), space.num_used, blocks.num_used) == ([1, 2, 3, 4], 4, 0)
    assert space.blocks_needed(swapped, [0, 1, 2]) == 4
    blocks.try_open([0], [list(range(50, 58))])  # others have been here since
    indices, new = space.back_in(swapped, [0, 1, 2], [3, 1, 2])
    assert indices.tolist() == [0, 1, 2, 3]
    moved = dict(zip(swapped.blocks.tolist(), new.tolist(), strict=True))
    assert blocks.tables[[3, 1, 2], :3].tolist() == [[moved[b] for b in row] for row in before.tolist()]
    assert (blocks.num_used, space.num_used) == (2 + 4, 0)
    blocks.check_invariants()


def test_without_room_nothing_changes():
    blocks, space = three_sharers(capacity=3)
    tables = blocks.tables.copy()
    assert space.try_out([0, 1, 2], [10, 10, 11]) is None
    np.testing.assert_array_equal(blocks.tables, tables)
    assert (space.num_used, blocks.num_used) == (0, 4)
    assert space.try_out([0, 1], [10, 10]) is not None, "these two need only three"
    blocks.check_invariants()


def test_blocks_without_anything_computed_stay_behind():
    _, space = three_sharers(capacity=4)
    swapped = space.try_out([0], [8])
    assert swapped.blocks.tolist() == [1, 2]


def test_only_the_rows_that_go_on_come_back():
    blocks, space = three_sharers(capacity=9)
    swapped = space.try_out([0, 1, 2], [10, 10, 11])
    assert space.blocks_needed(swapped, [2]) == 3
    indices, new = space.back_in(swapped, [2], [0])
    assert indices.tolist() == [0, 1, 3]
    assert blocks.tables[0, :3].tolist() == new.tolist()
    assert (space.num_used, blocks.num_used) == (0, 3)


def test_what_is_forgotten_gives_up_its_room():
    _, space = three_sharers(capacity=9)
    swapped = space.try_out([0, 1, 2], [10, 10, 11])
    space.forget(swapped)
    assert space.num_used == 0
