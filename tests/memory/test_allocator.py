"""BlockAllocator: every block is free, cached or referenced, and `check_invariants` notices when it is not."""

import pytest

from jpaged.memory.allocator import NULL_BLOCK, BlockAllocator


def test_hands_out_every_block_but_the_null_block_once():
    allocator = BlockAllocator(6)
    assert (allocator.num_usable, allocator.num_free) == (5, 5)
    assert allocator.allocate(2) == [1, 2]  # low ids first
    assert allocator.allocate(3) == [3, 4, 5]
    assert (allocator.num_free, allocator.refs[NULL_BLOCK]) == (0, 0)
    allocator.check_invariants([1, 2, 3, 4, 5])


def test_a_block_is_free_when_its_last_reference_is_released():
    allocator = BlockAllocator(3)
    [block] = allocator.allocate(1)
    allocator.acquire([block])
    allocator.check_invariants([block, block])
    allocator.release([block])
    assert (allocator.refs[block], allocator.num_free) == (1, 1)
    allocator.release([block])
    assert (allocator.refs[block], allocator.num_free, allocator.num_cached) == (0, 2, 0)
    allocator.check_invariants()


def test_kept_blocks_are_cached_after_release_and_come_back_to_life():
    allocator = BlockAllocator(4)
    kept, other = allocator.allocate(2)
    allocator.keep(kept)
    allocator.release([kept, other])
    assert (allocator.num_free, allocator.num_cached) == (3, 1)
    allocator.acquire([kept])
    assert (allocator.num_free, allocator.num_cached, allocator.refs[kept]) == (2, 0, 1)
    allocator.check_invariants([kept])


def test_free_blocks_go_first_then_the_least_recently_used_cached_ones():
    evicted = []
    allocator = BlockAllocator(6, evicted.append)
    blocks = allocator.allocate(4)
    for block in blocks:
        allocator.keep(block)
    allocator.release([blocks[2], blocks[0], blocks[1], blocks[3]])
    allocator.acquire([blocks[2]])
    allocator.release([blocks[2]])  # used again: now the most recent
    assert allocator.allocate(1) == [5]
    assert evicted == []
    assert allocator.allocate(3) == [blocks[0], blocks[1], blocks[3]] == evicted
    allocator.release([blocks[0]])
    assert allocator.num_cached == 1, "an evicted block is no longer kept: only blocks[2] is cached"
    allocator.check_invariants([5, blocks[1], blocks[3]])


def test_forget_all_turns_cached_blocks_into_free_ones_and_leaves_referenced_ones():
    evicted = []
    allocator = BlockAllocator(4, evicted.append)
    first, second = allocator.allocate(2)
    for block in (first, second):
        allocator.keep(block)
    allocator.release([first])
    allocator.forget_all()
    assert (allocator.num_cached, allocator.num_free, allocator.refs[second]) == (0, 2, 1)
    allocator.release([second])
    assert allocator.num_cached == 0
    allocator.check_invariants()
    assert evicted == [], "the owner of the contents asked for it and knows"


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_without_a_usable_block_is_refused(num_blocks):
    with pytest.raises(ValueError, match="null block"):
        BlockAllocator(num_blocks)


def _leak(allocator):
    allocator._free.pop()


def _free_twice(allocator):
    allocator._free.append(allocator._free[-1])


def _free_while_referenced(allocator):
    allocator._free.append(1)


def _hand_out_the_null_block(allocator):
    allocator._free.append(NULL_BLOCK)


def _cache_without_content(allocator):
    allocator._cached[allocator._free.pop()] = None


def _lose_a_reference(allocator):
    allocator.refs[1] -= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_leak, "in no state"),
        (_free_twice, "free twice"),
        (_free_while_referenced, "in two states"),
        (_hand_out_the_null_block, "null block"),
        (_cache_without_content, "kept contents differ"),
        (_lose_a_reference, "references differ from table entries at blocks \\[1\\]"),
    ],
)
def test_check_invariants_notices(damage, message):
    allocator = BlockAllocator(6)
    blocks = allocator.allocate(2)
    allocator.check_invariants(blocks)
    damage(allocator)
    with pytest.raises(RuntimeError, match=message):
        allocator.check_invariants(blocks)


def test_check_invariants_notices_a_table_entry_without_a_reference():
    allocator = BlockAllocator(6)
    allocator.allocate(1)
    with pytest.raises(RuntimeError, match="blocks \\[1, 2\\]"):
        allocator.check_invariants([1, 1, 2])
