"""BlockManager: tables, sharing and the watermark; and a model of the pool's content under random operations."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
    return new.tolist()


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


@pytest.mark.parametrize("options", [{"salt": "other"}, {"use_cache": False}])
def test_other_salts_and_rows_that_must_compute_find_nothing(options):
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt)
    assert opened(blocks, 1, prompt, **options) == 0
    assert not set(blocks.tables[1, :3]) & set(blocks.tables[0, :3])


def test_a_row_that_may_not_look_up_still_fills_the_cache():
    blocks = manager()
    prompt = list(range(10))
    computed(blocks, 0, prompt, use_cache=False)
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


FAMILIES = [[0] * 24, [0] * 7 + [1] * 17, [1, 0] * 12]
prompts = st.builds(
    lambda family, cut, tail: (family[:cut] + tail) or [0],
    st.sampled_from(FAMILIES),
    st.integers(0, 24),
    st.lists(st.integers(0, 1), max_size=2),
)


class BlockManagerMachine(RuleBasedStateMachine):
    """Rows that come, compute, grow and go, over an oracle of what each slot holds.

    The K and V of a token depend on all tokens before it, so the oracle writes the whole prefix (and the salt,
    which must separate) into every slot that a row computes. Whatever a row is told to be there must be there.
    """

    ROWS, WIDTH = 4, 12

    @initialize(
        num_blocks=st.integers(4, 20), size=st.integers(1, 4), caching=st.sampled_from([True, True, True, False])
    )
    def start(self, num_blocks, size, caching):
        self.size, self.caching = size, caching
        self.blocks = BlockManager(num_blocks, size, self.ROWS, self.WIDTH, enable_prefix_caching=caching)
        self.open: dict[int, tuple[str, list[int], int]] = {}  # row -> salt, tokens, how many are computed
        self.slots: dict[tuple[int, int], tuple] = {}  # (block, offset) -> (salt, tokens up to here)

    def slot(self, row, position):
        return int(self.blocks.tables[row, position // self.size]), position % self.size

    def erase(self, blocks):
        """New blocks come with worthless content."""
        for block in blocks:
            for offset in range(self.size):
                self.slots.pop((block, offset), None)

    @precondition(lambda self: len(self.open) < self.ROWS)
    @rule(
        tokens=prompts,
        salt=st.sampled_from(["", "", "", "salt"]),
        use_cache=st.sampled_from([True, True, True, False]),
        reserve=st.sampled_from([0, 0, 2]),
    )
    def try_open(self, tokens, salt, use_cache, reserve):
        tokens = tokens[: self.WIDTH * self.size]
        row = min(set(range(self.ROWS)) - set(self.open))
        free, tables = self.blocks.num_free, self.blocks.tables.copy()
        cached = opened(self.blocks, row, tokens, salt=salt, use_cache=use_cache, reserve=reserve)
        if cached is None:
            assert free < self.blocks.blocks_for(len(tokens)) + reserve
            assert self.blocks.num_free == free
            np.testing.assert_array_equal(self.blocks.tables, tables)
            return
        assert self.blocks.num_free >= reserve
        assert self.blocks.counts[row] == self.blocks.blocks_for(len(tokens))
        assert cached < len(tokens)
        assert cached % self.size == 0
        assert not cached or (use_cache and self.caching)
        held = {b for other in self.open for b in tables[other, : self.blocks.counts[other]].tolist()}
        fresh = self.blocks.tables[row, cached // self.size : self.blocks.counts[row]].tolist()
        assert not held & set(fresh), "a block that will be written belongs to one row"
        self.erase(fresh)
        self.open[row] = salt, list(tokens), cached

    @precondition(lambda self: any(done < len(tokens) for _, tokens, done in self.open.values()))
    @rule(data=st.data(), count=st.sampled_from([1, 3, 24, 24]))
    def compute(self, data, count):
        """A step computes a row's next tokens; then its full blocks are sealed."""
        row = data.draw(st.sampled_from([r for r, (_, tokens, done) in self.open.items() if done < len(tokens)]))
        salt, tokens, done = self.open[row]
        upto = min(done + count, len(tokens))
        for position in range(done, upto):
            self.slots[self.slot(row, position)] = salt, tuple(tokens[: position + 1])
        self.open[row] = salt, tokens, upto
        self.blocks.seal(row, tokens, upto)

    @precondition(lambda self: any(done == len(tokens) for _, tokens, done in self.open.values()))
    @rule(token=st.integers(0, 1))
    def decode(self, token):
        """All rows whose tokens are computed get one more, and a block for it where the last is full."""
        rows = [r for r, (_, tokens, done) in self.open.items() if done == len(tokens) < self.WIDTH * self.size]
        full = [r for r in rows if len(self.open[r][1]) == self.blocks.counts[r] * self.size]
        if len(full) > self.blocks.num_free:
            return
        new = grown(self.blocks, full)
        assert [self.blocks.tables[r, self.blocks.counts[r] - 1] for r in full] == new
        self.erase(new)
        for row in rows:
            self.open[row][1].append(token)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), reset=st.sampled_from([False] * 7 + [True]))
    def close(self, data, reset):
        row = data.draw(st.sampled_from(sorted(self.open)))
        self.blocks.close(row)
        del self.open[row]
        if reset:
            self.blocks.reset_prefix_cache()
            assert self.blocks.allocator.num_cached == 0

    @invariant()
    def every_computed_slot_holds_what_its_row_computed(self):
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_invariants()
        for row, (salt, tokens, done) in self.open.items():
            for position in range(done):
                assert self.slots.get(self.slot(row, position)) == (salt, tuple(tokens[: position + 1]))

    def teardown(self):
        if hasattr(self, "blocks"):
            for row in self.open:
                self.blocks.close(row)
            assert (self.blocks.num_used, self.blocks.tables.any()) == (0, False)
            self.blocks.check_invariants()


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=100, stateful_step_count=40)
