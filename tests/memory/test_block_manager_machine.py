"""BlockManager and SwapSpace under random operations, over a model of what every slot of the pool holds."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jpaged.memory import BlockManager, Swapped, SwapSpace, Table

FAMILIES = [[0] * 24, [0] * 7 + [1] * 17, [1, 0] * 12]
prompts = st.builds(
    lambda family, cut, tail: (family[:cut] + tail) or [0],
    st.sampled_from(FAMILIES),
    st.integers(0, 24),
    st.lists(st.integers(0, 1), max_size=2),
)


@dataclasses.dataclass
class Text:
    """What a row or a parked table stands for."""

    salt: str
    tokens: list[int]
    done: int
    """Tokens whose K and V have been computed."""

    @property
    def caught_up(self):
        return self.done == len(self.tokens)

    def copy(self):
        return Text(self.salt, list(self.tokens), self.done)

    def content(self, position, group):
        """The K and V of a token depend on all tokens before it (and salts must separate): so this names them."""
        return group, self.salt, tuple(self.tokens[: position + 1])


class BlockManagerMachine(RuleBasedStateMachine):
    """Rows come, compute, fork, write, leave for host memory or the car park, and go.

    The oracle does what a device would: it writes, copies and moves contents where it is told to. Whatever a row or a
    table is told to hold must be there, whoever wrote, copied, evicted or moved in the meantime.
    """

    ROWS, WIDTH = 6, 12

    @initialize(
        num_blocks=st.integers(4, 24),
        size=st.integers(1, 4),
        caching=st.sampled_from([True, True, True, False]),
        room=st.sampled_from([0, 3, 50]),
        max_chunk=st.sampled_from([None, 1, 4]),
        windows=st.sampled_from([(None,)] * 3 + [(1,), (3,), (6,), (11,), (None, 1), (None, 6), (6, 3), (None, 4, 4)]),
    )
    def start(self, num_blocks, size, caching, room, max_chunk, windows):
        self.size, self.caching, self.windows = size, caching, [window or 1000 for window in windows]
        self.groups, self.max_chunk = len(windows), max_chunk or 1000
        num_blocks = 1 + (num_blocks - 1) * self.groups
        self.blocks = BlockManager(
            num_blocks, size, self.ROWS, self.WIDTH, enable_prefix_caching=caching, windows=windows, max_chunk=max_chunk
        )
        self.space = SwapSpace(self.blocks, room)
        self.open: dict[int, Text] = {}
        self.parked: dict[Table, Text] = {}
        self.swapped: dict[Swapped, list[Text]] = {}
        self.pool: dict[int, list] = {}  # block -> what its slots hold

    def blocks_at(self, row, position):
        """Of each layer group, the block where a token's K and V are."""
        return self.blocks.by_group[row, position // self.size].tolist()

    def write(self, row, position):
        for group, block in enumerate(self.blocks_at(row, position)):
            self.pool[block][position % self.size] = self.open[row].content(position, group)

    def check(self, text, table):
        """A table holds all that a text's next token attends to."""
        for group, window in enumerate(self.windows):
            for position in range(max(text.done + 1 - window, 0), text.done):
                block = table[position // self.size * self.groups + group]
                assert self.pool[block][position % self.size] == text.content(position, group)

    def erase(self, blocks):
        """New blocks come with worthless content. Null ones are not there yet."""
        for block in blocks:
            if block:
                self.pool[block] = [None] * self.size

    def free_rows(self):
        return sorted(set(range(self.ROWS)) - set(self.open))

    def rows(self, caught_up=True):
        return [row for row, text in self.open.items() if text.caught_up == caught_up]

    # ------------------------------------------------------------------------------------------- open and compute

    @precondition(lambda self: len(self.open) < self.ROWS)
    @rule(
        tokens=prompts,
        salt=st.sampled_from(["", "", "", "salt"]),
        use_cache=st.sampled_from([True, True, True, False]),
        reserve=st.sampled_from([0, 0, 2]),
    )
    def try_open(self, tokens, salt, use_cache, reserve):
        self.open_one(tokens[: self.WIDTH * self.size], salt, use_cache, reserve)

    @precondition(lambda self: self.open and len(self.open) < self.ROWS)
    @rule(data=st.data(), cut=st.integers(0, 8))
    def try_open_what_others_are_made_of(self, data, cut):
        """The beginning of one text and the end of another: the chain of neither may lead to the other's blocks."""
        one, other = (self.open[data.draw(st.sampled_from(sorted(self.open)))] for _ in range(2))
        cut *= self.size
        self.open_one((one.tokens[:cut] + other.tokens[cut:] + [0])[: self.WIDTH * self.size], one.salt, True, 0)

    def open_one(self, tokens, salt, use_cache, reserve):
        row = self.free_rows()[0]
        free, tables = self.blocks.num_free, self.blocks.tables.copy()
        opened = self.blocks.try_open([row], [tokens], salt=salt, findable=None if use_cache else 0, reserve=reserve)
        if opened is None:
            assert free < self.blocks.blocks_for(len(tokens)) + reserve
            assert self.blocks.num_free == free
            np.testing.assert_array_equal(self.blocks.tables, tables)
            return
        [cached] = opened
        assert self.blocks.num_free >= reserve
        assert self.blocks.counts[row] == self.blocks.blocks_for(len(tokens))
        assert cached < len(tokens)
        assert cached % self.size == 0
        assert not cached or (use_cache and self.caching)
        fresh = self.blocks.tables[row, self.blocks.blocks_for(cached) : self.blocks.counts[row]].tolist()
        refs = self.blocks.allocator.refs[[block for block in fresh if block]]
        assert (refs == 1).all(), "a block that will be written belongs to one row"
        self.erase(fresh)
        self.open[row] = Text(salt, list(tokens), cached)

    @precondition(lambda self: len(self.open) <= self.ROWS - 2)
    @rule(first=prompts, cut=st.integers(1, 24), tail=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def try_open_together(self, first, cut, tail):
        """Two rows that begin alike: the first computes what they have in common."""
        limit, rows = self.WIDTH * self.size, self.free_rows()[:2]
        lists = [first[:limit], (first[:cut] + tail)[:limit]]
        opened = self.blocks.try_open(rows, lists)
        if opened is None:
            return
        for row, tokens, cached in zip(rows, lists, opened, strict=True):
            assert cached < len(tokens)
            self.erase(self.blocks.tables[row, self.blocks.blocks_for(cached) : self.blocks.counts[row]].tolist())
            self.open[row] = Text("", list(tokens), cached)
            self.advance(row, len(tokens))

    @precondition(lambda self: self.rows(caught_up=False))
    @rule(data=st.data(), count=st.sampled_from([1, 3, 24, 24]))
    def compute(self, data, count):
        """A step computes a row's next tokens; then its full blocks are sealed."""
        row = data.draw(st.sampled_from(self.rows(caught_up=False)))
        done, free, before = self.open[row].done, self.blocks.num_free, self.blocks.tables[row].tolist()
        lacking = self.blocks.lacking(row, done)
        assert self.blocks.extend(row, done) == (free > self.blocks.num_free)
        fresh = [now for now, then in zip(self.blocks.tables[row].tolist(), before, strict=True) if now != then]
        assert len(fresh) == free - self.blocks.num_free
        self.erase(fresh)
        covered = self.blocks.covered(row)
        assert covered > done or lacking > free
        self.advance(row, min(done + min(count, self.max_chunk), covered, len(self.open[row].tokens)))

    def advance(self, row, upto):
        text = self.open[row]
        for position in range(text.done, upto):
            self.write(row, position)
        text.done = upto
        self.blocks.seal(row, text.tokens, upto)

    @precondition(lambda self: self.open)
    @rule()
    def slide(self):
        """A step is planned: what no later token of a row attends to is given back."""
        rows = np.array(sorted(self.open), np.int32)
        done = np.array([self.open[row].done for row in rows.tolist()], np.int32)
        free = self.blocks.num_free
        self.blocks.slide(rows, done)
        assert self.blocks.num_free >= free
        ends = self.blocks.counts[rows, None] // self.groups
        held = (ends - self.blocks.firsts[rows]) * self.size
        ahead = ends * self.size - done[:, None]
        assert (held <= ahead + self.windows + 2 * self.size).all(), "the window, and a block on each side"

    # -------------------------------------------------------------------------------------------- forks and writes

    @precondition(lambda self: self.rows() and len(self.open) < self.ROWS)
    @rule(data=st.data())
    def fork(self, data):
        source, row = data.draw(st.sampled_from(self.rows())), self.free_rows()[0]
        used = self.blocks.num_used
        self.blocks.fork(source, row)
        assert self.blocks.num_used == used
        self.open[row] = self.open[source].copy()

    @precondition(lambda self: self.rows())
    @rule(data=st.data(), everyone=st.booleans(), tokens=st.lists(st.integers(0, 1), min_size=ROWS, max_size=ROWS))
    def decode(self, data, everyone, tokens):
        """All rows that have caught up, or some of them, get a token each and compute it: the device copies, then writes."""
        rows = [row for row in self.rows() if self.open[row].done < self.WIDTH * self.size]
        if not everyone:
            rows = [row for row in rows if data.draw(st.booleans())]
        positions = [self.open[row].done for row in rows]
        writes = self.blocks.writes(np.array(rows, np.int32), np.array(positions, np.int32))
        if writes.num_blocks > self.blocks.num_free:
            return
        free, num_copies = self.blocks.num_free, self.blocks.num_copies
        before = self.blocks.tables.copy()
        new, copies = self.blocks.make_writable(writes)
        assert free - self.blocks.num_free == writes.num_blocks == (new > 0).sum()
        assert self.blocks.num_copies - num_copies == len(copies)
        for row, told, position in zip(rows, new.tolist(), positions, strict=True):
            for group, block in enumerate(told):
                if block:  # which is all that the device is told
                    before[row, position // self.size * self.groups + group] = block
        np.testing.assert_array_equal(self.blocks.tables, before)
        sources, destinations = {s for s, _ in copies}, [d for _, d in copies]
        assert not sources & set(destinations)
        contents = [list(self.pool[source]) for source, _ in copies]
        self.erase(new[new > 0].tolist())
        for destination, content in zip(destinations, contents, strict=True):
            self.pool[destination] = content
        written = [b for row, position in zip(rows, positions, strict=True) for b in self.blocks_at(row, position)]
        assert len(set(written)) == len(written)
        assert all(map(self.blocks.allocator.is_writable, written))
        for row, token in zip(rows, tokens, strict=False):
            self.open[row].tokens.append(token)
            self.advance(row, len(self.open[row].tokens))

    # ------------------------------------------------------------------------------------------------------- swap

    @precondition(lambda self: self.rows())
    @rule(data=st.data())
    def swap_out(self, data):
        rows = data.draw(st.lists(st.sampled_from(self.rows()), min_size=1, unique=True))
        held = {b for row in rows for b in self.blocks.tables[row].tolist() if b}
        used, tables = self.space.num_used, self.blocks.tables.copy()
        swapped = self.space.try_out(rows, [self.open[row].done for row in rows])
        if swapped is None:
            assert used + len(held) > self.space.capacity
            assert self.space.num_used == used
            np.testing.assert_array_equal(self.blocks.tables, tables)
            return
        assert sorted(swapped.blocks.tolist()) == sorted(held), "each block leaves once"
        assert self.space.num_used == used + len(held) <= self.space.capacity
        swapped.contents = [list(self.pool[block]) for block in swapped.blocks.tolist()]
        self.swapped[swapped] = [self.open.pop(row) for row in rows]

    @precondition(lambda self: self.swapped)
    @rule(data=st.data(), everyone=st.booleans())
    def swap_in(self, data, everyone):
        swapped = data.draw(st.sampled_from(list(self.swapped)))
        texts = self.swapped[swapped]
        which = [i for i in range(len(texts)) if everyone or data.draw(st.booleans())]
        if not which or len(which) > len(self.free_rows()):
            return
        need = self.space.blocks_needed(swapped, which)
        if need > self.blocks.num_free:
            return
        rows, free, used = self.free_rows()[: len(which)], self.blocks.num_free, self.space.num_used
        indices, blocks = self.space.back_in(swapped, which, rows)
        assert len(indices) == len(blocks) == need == free - self.blocks.num_free
        assert self.space.num_used == used - len(swapped.blocks)
        for index, block in zip(indices.tolist(), blocks.tolist(), strict=True):
            self.pool[block] = list(swapped.contents[index])
        for i, row in zip(which, rows, strict=True):
            assert swapped.positions[i] == texts[i].done
            self.open[row] = texts[i]
        del self.swapped[swapped]

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def forget(self, data):
        swapped = data.draw(st.sampled_from(list(self.swapped)))
        self.space.forget(swapped)
        del self.swapped[swapped]

    # ------------------------------------------------------------------------------------------------------- park

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def park(self, data):
        row = data.draw(st.sampled_from(sorted(self.open)))
        text = self.open.pop(row)
        self.parked[self.blocks.parked.park(row, text.done)] = text

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def fork_parked(self, data):
        table = data.draw(st.sampled_from(list(self.parked)))
        used = self.blocks.num_used
        self.parked[self.blocks.parked.fork(table)] = self.parked[table].copy()
        assert self.blocks.num_used == used

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), cut=st.integers(0, 24))
    def truncate_parked(self, data, cut):
        table = data.draw(st.sampled_from(list(self.parked)))
        self.blocks.parked.truncate(table, cut)
        text = self.parked[table]
        text.done = min(text.done, cut)
        if not table.num_computed:
            assert text.done == 0 or min(self.windows) < 1000, "what the cut left was behind the window"
            text.done = 0
        del text.tokens[text.done :]

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def release_parked(self, data):
        table = data.draw(st.sampled_from(list(self.parked)))
        self.blocks.parked.release(table)
        del self.parked[table]

    @precondition(lambda self: len(self.open) < self.ROWS and any(text.done for text in self.parked.values()))
    @rule(data=st.data(), tail=st.lists(st.integers(0, 1), max_size=5))
    def unpark(self, data, tail):
        """What comes after the computed tokens may differ from what was there before a cut."""
        table = data.draw(st.sampled_from([t for t, text in self.parked.items() if text.done]))
        text, row = self.parked[table], self.free_rows()[0]
        tokens = (text.tokens + tail)[: self.WIDTH * self.size]
        held, free = len(table.blocks), self.blocks.num_free
        if not self.blocks.parked.can_resume(table, len(tokens)):
            assert min(self.windows) < 1000
            self.blocks.parked.release(table)
            del self.parked[table]
            return
        opened = self.blocks.parked.try_unpark(table, row, len(tokens))
        if opened is None:
            assert free < self.blocks.blocks_for(len(tokens)) - held + self.groups
            assert self.blocks.num_free == free
            return
        start, copies = opened
        assert start == min(text.done, len(tokens) - 1)
        for source, destination in copies:
            self.pool[destination] = list(self.pool[source])
        self.erase(self.blocks.tables[row, held : self.blocks.counts[row]].tolist())
        assert (self.blocks.allocator.refs[self.blocks_at(row, start)] == 1).all(), "what will be written is its own"
        del self.parked[table]
        self.open[row] = Text(text.salt, tokens, start)

    @precondition(lambda self: self.parked)
    @rule(wanted=st.integers(0, 24))
    def reclaim(self, wanted):
        self.blocks.parked.reclaim(wanted)
        kept = [table in self.blocks.parked for table in self.parked]
        assert kept == sorted(kept), "those that were parked first went first"
        assert self.blocks.num_free >= wanted or not any(kept)
        for table in [table for table, stays in zip(self.parked, kept, strict=True) if not stays]:
            assert (len(table.blocks), table.num_computed) == (0, 0)
            del self.parked[table]

    # ---------------------------------------------------------------------------------------------------- the end

    @precondition(lambda self: self.open)
    @rule(data=st.data(), reset=st.sampled_from([False] * 7 + [True]))
    def close(self, data, reset):
        row = data.draw(st.sampled_from(sorted(self.open)))
        self.blocks.close(row)
        del self.open[row]
        if reset:
            self.blocks.reset_prefix_cache()
            assert self.blocks.allocator.num_cached == 0
            assert not any(len(table.blocks) for table in self.parked), "their contents are forgotten too"
            self.parked.clear()

    @invariant()
    def everything_computed_is_where_it_should_be(self):
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_invariants()
        for row, text in self.open.items():
            self.check(text, self.blocks.tables[row].tolist())
        for table, text in self.parked.items():
            assert table.num_computed == text.done
            self.check(text, table.blocks.tolist())

    def teardown(self):
        if not hasattr(self, "blocks"):
            return
        for row in self.open:
            self.blocks.close(row)
        for table in self.parked:
            self.blocks.parked.release(table)
        for swapped in self.swapped:
            self.space.forget(swapped)
        assert (self.blocks.num_used, self.blocks.tables.any(), self.space.num_used) == (0, False, 0)
        self.blocks.check_invariants()


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=100, stateful_step_count=50)
