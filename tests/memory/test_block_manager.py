"""BlockManager: tables, sharing, copy-on-write, parking and the watermark. Random operations:
test_block_manager_machine.py."""

import functools

import numpy as np
import pytest

from jpaged.memory import BlockManager


def manager(num_blocks=9, block_size=4, rows=4, width=8, **options) -> BlockManager:
    return BlockManager(num_blocks, block_size, rows, width, **options)


def opened(blocks, row, tokens, **options):
    cached = blocks.try_open([row], [tokens], **options)
    return None if cached is None else cached[0]


def grown(blocks, rows):
    """Gives full rows a block for their next token."""
    rows = np.array(rows, np.int32)
    writes = blocks.writes(rows, blocks.counts[rows] * blocks.block_size)
    assert writes.num_blocks == len(rows)
    new, copies = blocks.make_writable(writes)
    assert not copies
    return new.ravel().tolist()


def computed(blocks, row, tokens, **options):
    """Opens a row, as if a step had computed all of its tokens at once."""
    cached = opened(blocks, row, tokens, **options)
    blocks.seal(row, tokens, len(tokens))
    return cached


def test_a_row_gets_blocks_for_all_its_tokens_and_grows_by_one():
    blocks = manager()
    assert opened(blocks, 2, range(5)) == 0
    assert blocks.tables[2].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert (blocks.num_used, blocks.num_free) == (2, 6)
    opened(blocks, 0, range(100, 104))
    assert grown(blocks, [2, 0]) == [4, 5]
    assert blocks.tables[2, :4].tolist() == [1, 2, 4, 0]
    assert blocks.tables[0, :4].tolist() == [3, 5, 0, 0]
    blocks.check_invariants()
    blocks.close(2)
    blocks.close(0)
    assert (blocks.num_used, blocks.tables.any(), blocks.counts.any()) == (0, False, False)
    blocks.check_invariants()


def test_opening_is_all_or_nothing():
    blocks = manager(num_blocks=5)
    computed(blocks, 0, list(range(8)))
    before = blocks.tables.copy()
    assert opened(blocks, 1, [*range(8), *range(100, 109)]) is None, "one more block than there is"
    assert opened(blocks, 1, [*range(8), 100], reserve=2) is None, "there is one, but two would have to stay free"
    np.testing.assert_array_equal(blocks.tables, before)
    assert (blocks.num_free, blocks.stats.queries) == (2, 8)
    assert opened(blocks, 1, [*range(8), 100], reserve=1) == 8
    blocks.check_invariants()


def test_a_hit_that_nobody_holds_is_taken_from_the_free_ones():
    blocks = manager(num_blocks=4)
    prompt = list(range(9))
    computed(blocks, 0, prompt)
    blocks.close(0)
    assert (blocks.num_free, blocks.allocator.num_cached) == (3, 2)
    assert opened(blocks, 0, prompt, reserve=1) is None, "two revived and one new leave none"
    assert opened(blocks, 0, prompt) == 8
    assert blocks.num_free == 0
    blocks.check_invariants()


def test_watermark_is_a_share_of_the_usable_blocks():
    assert manager(num_blocks=301, watermark=0.01).watermark_blocks == 3
    assert manager(num_blocks=100, watermark=0.01).watermark_blocks == 0


def test_running_and_finished_rows_are_shared_with():
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt)
    assert opened(blocks, 1, prompt) == 8
    assert blocks.tables[1, :2].tolist() == blocks.tables[0, :2].tolist()
    assert blocks.tables[1, 2] != blocks.tables[0, 2], "the partial block is each row's own"
    blocks.close(0)
    assert opened(blocks, 2, prompt[:9]) == 8
    assert (blocks.stats.queries, blocks.stats.hits) == (29, 16)
    blocks.check_invariants()


def test_only_computed_blocks_are_found():
    blocks = manager()
    prompt = list(range(12))
    opened(blocks, 0, prompt)
    assert opened(blocks, 1, prompt) == 0
    blocks.close(1)
    blocks.seal(0, prompt, 7)
    assert opened(blocks, 1, prompt) == 4
    blocks.close(1)
    blocks.seal(0, prompt, 8)
    assert opened(blocks, 1, prompt) == 8


@pytest.mark.parametrize("options", [{"salt": "other"}, {"findable": 0}])
def test_other_salts_and_rows_that_must_compute_find_nothing(options):
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt)
    assert opened(blocks, 1, prompt, **options) == 0
    assert not set(blocks.tables[1, :3]) & set(blocks.tables[0, :3])


def test_a_row_that_may_not_look_up_still_fills_the_cache():
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt, findable=0)
    assert blocks.stats.queries == 0
    assert opened(blocks, 1, prompt) == 8


def test_without_prefix_caching_nothing_is_kept():
    blocks = manager(enable_prefix_caching=False)
    prompt = list(range(10))
    computed(blocks, 0, prompt)
    blocks.close(0)
    assert (computed(blocks, 0, prompt), blocks.allocator.num_cached, blocks.stats.queries) == (0, 0, 0)


def test_tails_are_evicted_before_beginnings():
    blocks = manager(num_blocks=5)
    prompt = list(range(16))
    computed(blocks, 0, prompt)
    blocks.close(0)
    opened(blocks, 1, range(100, 108))  # takes two of the four
    assert opened(blocks, 0, prompt[:9]) is None, "8 cached tokens, but no block for the ninth"
    blocks.close(1)
    assert opened(blocks, 0, prompt) == 8, "the last two went, not the first two"


def test_a_block_that_was_given_to_another_row_is_not_found_again():
    blocks = manager(num_blocks=4)
    prompt = list(range(12))
    computed(blocks, 0, prompt)
    blocks.close(0)
    opened(blocks, 1, range(100, 112))
    blocks.close(1)
    assert opened(blocks, 0, prompt) == 0


def test_reset_forgets_the_past_and_leaves_running_rows_alone():
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt)
    table = blocks.tables[0].copy()
    blocks.reset_prefix_cache()
    np.testing.assert_array_equal(blocks.tables[0], table)
    assert opened(blocks, 1, prompt) == 0
    blocks.check_invariants()
    blocks.close(0)
    assert blocks.allocator.num_cached == 0


def test_check_invariants_looks_at_the_tables_too():
    blocks = manager()
    opened(blocks, 0, range(5))
    blocks.tables[0, 2] = 3
    with pytest.raises(RuntimeError, match="beyond its count"):
        blocks.check_invariants()
    blocks.tables[0, 2] = blocks.tables[0, 1] = 0
    with pytest.raises(RuntimeError, match="null block"):
        blocks.check_invariants()


# --------------------------------------------------------------------------------------- forks and copy-on-write


def decoded(blocks, rows, position):
    """One token of each row is about to be written at one position; (new blocks, copies)."""
    rows = np.array(rows, np.int32)
    writes = blocks.writes(rows, np.full(len(rows), position, np.int32))
    free = blocks.num_free
    new, copies = blocks.make_writable(writes)
    assert free - blocks.num_free == writes.num_blocks
    blocks.check_invariants()
    return new.ravel().tolist(), copies


def test_a_fork_shares_every_block_and_costs_none():
    blocks = manager()
    opened(blocks, 0, range(10))
    blocks.fork(0, 1)
    blocks.fork(1, 2)
    assert (blocks.tables[[1, 2]] == blocks.tables[0]).all()
    assert blocks.num_used == 3
    blocks.check_invariants()


def test_the_last_of_those_who_share_a_block_writes_in_place():
    blocks = manager()
    opened(blocks, 0, range(10))
    for row in (1, 2):
        blocks.fork(0, row)
    new, copies = decoded(blocks, [0, 1, 2], 10)
    assert (new, copies) == ([4, 5, 0], [(3, 4), (3, 5)])
    assert blocks.tables[[0, 1, 2], 2].tolist() == [4, 5, 3]
    assert (blocks.tables[:3, :2] == [1, 2]).all(), "full blocks stay shared"
    assert decoded(blocks, [0, 1, 2], 11) == ([0, 0, 0], []), "it is done once"
    assert blocks.num_copies == 2


def test_who_writes_alone_copies_and_leaves_the_block_to_the_others():
    blocks = manager()
    opened(blocks, 0, range(10))
    for row in (1, 2):
        blocks.fork(0, row)
    assert decoded(blocks, [1], 10) == ([4], [(3, 4)])
    assert blocks.tables[[0, 2], 2].tolist() == [3, 3]
    blocks.close(0)
    assert decoded(blocks, [2], 10) == ([0], []), "nobody else is left"


def test_behind_a_full_block_everyone_gets_a_fresh_one():
    blocks = manager()
    opened(blocks, 0, range(8))
    blocks.fork(0, 1)
    assert decoded(blocks, [0, 1], 8) == ([3, 4], [])
    assert blocks.num_copies == 0


def test_a_fork_knows_the_chain_of_its_blocks():
    """What it fills is found by whoever has the same tokens, under the same salt."""
    blocks = manager(num_blocks=12)
    prompt = list(range(8))
    computed(blocks, 0, prompt, salt="a")
    blocks.fork(0, 1)
    for position in range(8, 12):
        decoded(blocks, [1], position)
    blocks.seal(1, [*prompt, 7, 7, 7, 7], 12)
    blocks.close(0)
    blocks.close(1)
    assert opened(blocks, 0, [*prompt, 7, 7, 7, 7, 0], salt="a") == 12
    assert opened(blocks, 1, [*prompt, 7, 7, 7, 7, 0]) == 0


def test_forks_that_part_do_not_continue_each_others_chains():
    blocks = manager(num_blocks=20)
    prompt, ones, twos, threes = list(range(8)), [1] * 4, [2] * 4, [3] * 4
    computed(blocks, 0, prompt)
    blocks.fork(0, 1)
    for position in range(8, 12):
        decoded(blocks, [0, 1], position)
    blocks.seal(0, prompt + ones, 12)
    blocks.seal(1, prompt + twos, 12)
    for position in range(12, 16):
        decoded(blocks, [1], position)
    blocks.seal(1, prompt + twos + threes, 16)
    assert opened(blocks, 2, [*prompt, *twos, *threes, 0]) == 16
    assert opened(blocks, 3, [*prompt, *ones, *threes, 0]) == 12


def test_rows_that_begin_alike_are_opened_together_and_share():
    """What they have in common is computed by the first of them; each computes its own last token."""
    blocks = manager(num_blocks=12)
    rows = [[*range(9), 50], [*range(9), 51], [*range(8)], [*range(4), 9]]
    assert blocks.try_open([0, 1, 2, 3], rows) == [0, 8, 4, 4]
    assert blocks.tables[1, :2].tolist() == blocks.tables[0, :2].tolist()
    assert blocks.tables[2, 0] == blocks.tables[3, 0] == blocks.tables[0, 0]
    assert blocks.num_used == 3 + 1 + 1 + 1
    blocks.check_invariants()
    assert blocks.try_open([3], [list(range(100, 140))]) is None


# -------------------------------------------------------------------------------------------------------- windows


def slid(blocks, row, position):
    blocks.slide(np.array([row]), np.array([position]))
    blocks.check_invariants()


def test_a_window_leaves_blocks_behind():
    blocks = manager(windows=[6], enable_prefix_caching=False)
    opened(blocks, 0, range(24))
    slid(blocks, 0, 13)
    assert (blocks.tables[0, :6].tolist(), blocks.num_used) == ([0, 2, 3, 4, 5, 6], 5), "one more than is needed stays"
    blocks.fork(0, 1)
    slid(blocks, 0, 24)
    assert (blocks.tables[0, :6].tolist(), blocks.num_used) == ([0, 0, 0, 4, 5, 6], 5), "the fork has them still"
    blocks.close(1)
    assert blocks.num_used == 3


def test_layers_with_a_window_give_back_what_the_others_keep():
    """Two groups: entries of a table alternate, and each group frees what its own window has left."""
    blocks = manager(num_blocks=30, windows=[None, 6], enable_prefix_caching=False)
    opened(blocks, 0, range(22))
    assert blocks.tables[0].tolist() == [*range(1, 13), 0, 0, 0, 0]
    assert decoded(blocks, [0], 22) == ([0, 0], [])
    slid(blocks, 0, 23)
    assert blocks.by_group[0, :7].tolist() == [[1, 0], [3, 0], [5, 0], [7, 8], [9, 10], [11, 12], [0, 0]]
    blocks.fork(0, 1)
    assert decoded(blocks, [0, 1], 23) == ([6, 4, 0, 0], [(11, 6), (12, 4)]), (
        "one of the sharers copies, in both groups"
    )
    assert decoded(blocks, [0], 24) == ([2, 13], [])
    assert blocks.num_used == 6 + 3 + 2 + 2
    blocks.close(0)
    blocks.close(1)
    assert blocks.num_used == 0


def test_what_a_window_has_left_need_not_be_cached():
    blocks = manager(num_blocks=9, windows=[6])
    prompt = list(range(24))
    computed(blocks, 0, prompt)
    slid(blocks, 0, 24)
    blocks.close(0)
    opened(blocks, 1, range(100, 116))  # the two free blocks, and the first two of those that were left behind
    blocks.close(1)
    assert opened(blocks, 0, prompt) == 20
    assert (blocks.tables[0, :6] > 0).tolist() == [False] * 3 + [True] * 3
    blocks.check_invariants()


def test_a_row_does_not_begin_with_blocks_that_its_sibling_left_behind():
    blocks = manager(num_blocks=30, windows=[6])
    prompt = list(range(24))
    computed(blocks, 0, prompt)
    blocks.close(0)
    blocks.cache.match = functools.partial(_only, blocks.cache.match, prompt)
    assert blocks.try_open([0, 1], [prompt, [*prompt[:12], 9, 9, 9]]) == [20, 0]
    assert blocks.tables[1, 0] != 0
    blocks.check_invariants()


def _only(match, known, tokens, *arguments):
    return match(tokens, *arguments) if tokens == known else ([], [])


def test_a_table_cut_back_to_what_a_window_has_left_is_nothing():
    blocks = manager(windows=[6], enable_prefix_caching=False)
    opened(blocks, 0, range(24))
    slid(blocks, 0, 24)
    table = blocks.parked.park(0, 24)
    blocks.parked.truncate(table, 20)
    assert (table.blocks.tolist(), table.num_computed) == ([0, 0, 0, 4, 5], 20)
    assert blocks.parked.can_resume(table, 18)
    assert not blocks.parked.can_resume(table, 15)
    blocks.parked.truncate(table, 16)
    assert table.num_computed == 0 or blocks.parked.can_resume(table, 17)
    blocks.parked.truncate(table, 9)
    assert (table.blocks.tolist(), table.num_computed, blocks.num_used) == ([], 0, 0)
    blocks.check_invariants()


# -------------------------------------------------------------------------------------------------- parked tables


def test_a_parked_table_keeps_its_blocks_and_frees_its_row():
    blocks = manager(enable_prefix_caching=False)
    opened(blocks, 0, range(14))
    table = blocks.parked.park(0, 9)
    assert (table.blocks.tolist(), table.num_computed, blocks.num_used) == ([1, 2, 3], 9, 3)
    assert not blocks.tables.any()
    other = blocks.parked.fork(table)
    assert blocks.num_used == 3
    blocks.parked.truncate(table, 4)
    assert (table.blocks.tolist(), table.num_computed, blocks.num_used) == ([1], 4, 3)
    blocks.check_invariants()
    blocks.parked.release(other)
    assert blocks.num_used == 1
    blocks.parked.release(other)  # again: no harm
    blocks.parked.release(table)
    assert blocks.num_used == 0
    blocks.check_invariants()


def test_who_has_been_parked_longest_is_reclaimed_first():
    blocks = manager(enable_prefix_caching=False)
    tables = []
    for row, length in ((0, 8), (1, 8), (2, 8)):
        opened(blocks, row, range(length))
        tables.append(blocks.parked.park(row, length))
    blocks.parked.reclaim(2)
    assert [len(t.blocks) for t in tables] == [2, 2, 2], "there were two free blocks"
    blocks.parked.reclaim(5)
    assert [len(t.blocks) for t in tables] == [0, 0, 2]
    blocks.parked.reclaim(99)
    assert blocks.num_used == 0
    blocks.check_invariants()
