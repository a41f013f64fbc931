"""An engine without a model: the real Scheduler and BlockManager, over a device that remembers what is in every slot.

`Device` sees what the real one sees, the admissions and the packed plans, and nothing else. Its pool holds, for every
slot, which prefix's K and V were written there: the K and V of a token depend on all tokens before it, so a prefix is
a name for them. It checks that whatever a step attends to is what belongs there, and the token that it "samples" is a
function of the prefix, the request's seed and the sequence's index, as the real one's is (DESIGN, contract 8). So
`NullEngine.expected` knows every output beforehand, whatever is batched, cut, shared, evicted or preempted.

`NullEngine` drives them as `LLMEngine` does: a step is committed one step late.
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Sequence as Tokens

import numpy as np

from jpaged.memory import BlockManager
from jpaged.outputs import RequestMetrics
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import Scheduler, StepPlan
from jpaged.scheduling.beam_search import path
from jpaged.scheduling.beams import Candidates, new_search
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.scheduling.plan import make_buckets, split_packed
from jpaged.scheduling.scheduler import PreemptionMode
from jpaged.scheduling.sharing import SharingFinder
from jpaged.sequence import FinishReason, Sequence, SequenceGroup, Status

VOCAB = 4
STOP_TOKEN = 3


class Prefixes:
    """Numbers for token prefixes: equal numbers, equal prefixes."""

    EMPTY = 0

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def extend(self, prefix: int, token: int) -> int:
        return self._numbers.setdefault((prefix, token), len(self._numbers) + 1)


def next_token(prefix: int, seed: int, index: int) -> int:
    return hash((prefix, seed, index)) % VOCAB


def best_continuations(prefixes: np.ndarray, scores: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """The `count` best of all continuations of some beams: (scores float32, parents, tokens), best first."""
    gains = [[-(1 + hash((int(p), token)) % 1009) / 500 for token in range(VOCAB)] for p in prefixes]
    totals = (scores[:, None] + np.array(gains, np.float32)).reshape(-1)
    best = np.argsort(-totals, kind="stable")[:count]
    best = np.pad(best, (0, count - len(best)), mode="edge")
    return totals[best], best // VOCAB, best % VOCAB


class Device:
    """The batch state, the pool, and steps that run on them."""

    def __init__(
        self,
        prefixes: Prefixes,
        *,
        rows: int,
        max_len: int,
        num_blocks: int,
        block_size: int,
        tile_size: int,
        looks: bool,
        windows: Tokens[int | None],
    ) -> None:
        self.windows, self.groups = [window or max_len for window in windows], len(windows)
        self.prefixes, self.block_size, self.tile_size, self.looks = prefixes, block_size, tile_size, looks
        self.null_row = rows
        self.tokens = np.zeros((rows + 1, max_len), np.int32)
        self.tables = np.zeros((rows + 1, -(-max_len // block_size) * self.groups), np.int32)
        self.keys = [(0, 0)] * (rows + 1)
        self.pool = np.full(num_blocks * block_size, Prefixes.EMPTY)
        self._chains: list[list[int]] = [[] for _ in range(rows + 1)]  # of each row: the prefixes of its tokens

    def prepare(self, plan: StepPlan) -> None:
        """What comes before a plan's admissions: blocks leave and come back, rows are edited."""
        blocks = self.pool.reshape(-1, self.block_size)
        for swapped in plan.swaps_out:
            swapped.contents = blocks[swapped.blocks].copy()
        for swapped, indices, targets in plan.swaps_in:
            blocks[targets] = swapped.contents[indices]
        for source, row in plan.edits.forks:
            self.tokens[row], self.tables[row] = self.tokens[source], self.tables[source]
            self._chains[row] = []
        for row, position, token in plan.edits.tokens:
            self.tokens[row, position] = token

    def admit(self, sequence: Sequence, table: np.ndarray) -> None:
        row = sequence.row
        self.tokens[row] = 0
        self.tokens[row, : len(sequence.tokens)] = sequence.tokens
        self.tables[row] = table
        self.keys[row] = sequence.group.seed, sequence.index
        self._chains[row] = []

    def run(self, plan: StepPlan) -> tuple[np.ndarray, Candidates | None]:
        """Runs the packed plan; returns a token for each of the bucket's results, and the beams' candidates."""
        packed = plan.pack(self.null_row)
        decode, prefill, results, copies, num_copies, pieces = split_packed(packed, plan.bucket, self.groups)
        self._copy(copies[:, : num_copies[0]].T.tolist())
        rows, positions = decode[:2].tolist()
        for row, position, blocks in zip(rows, positions, decode[2:].T.tolist(), strict=True):
            for group, block in enumerate(blocks):
                if block:
                    self.tables[row, position // self.block_size * self.groups + group] = block
        if not self.looks:
            results = (np.arange(plan.bucket.num_results) + len(plan.tiles)) % VOCAB
            return results, self._candidates(plan, np.zeros(len(results), np.int64))
        work = [(row, at, at + 1) for row, at in zip(rows, positions, strict=True) if row != self.null_row]
        for row, start, length in prefill.T.tolist():
            assert length <= self.tile_size
            if row != self.null_row:
                work.append((row, start, start + length))
        self._check_pieces(pieces, decode)
        self._write(work)
        for row, start, end in work:
            self._check(row, start, end)
        after = np.full(plan.bucket.num_results, -1)
        for i, (row, token) in enumerate(results.T.tolist()):
            if row != self.null_row:
                source, position = self._of_token(token, decode, prefill)
                after[i] = self._chains[source][position]
        return self._sample(results[0], after, plan), self._candidates(plan, after)

    def _copy(self, copies: list[list[int]]) -> None:
        blocks = self.pool.reshape(-1, self.block_size)
        sources, destinations = [s for s, _ in copies], [d for _, d in copies]
        assert len(set(destinations)) == len(copies)
        assert not set(sources) & set(destinations)
        blocks[destinations] = blocks[sources]

    def _check_pieces(self, pieces: np.ndarray, decode: np.ndarray) -> None:
        """Rows that are read together share blocks that are full and before all of their queries; a lane is in one piece."""
        seen: list[int] = []
        for *members, count in pieces.tolist():
            if count:
                rows, positions = decode[:2, [m for m in members if m >= 0]]
                assert len(rows) > 1
                tables = self.tables[:, :: self.groups]  # of the group that sees furthest
                assert (tables[rows, :count] == tables[rows[0], :count]).all()
                assert (count * self.block_size <= positions).all()
                seen += [m for m in members if m >= 0]
        assert len(set(seen)) == len(seen)

    def _of_token(self, token: int, decode: np.ndarray, prefill: np.ndarray) -> tuple[int, int]:
        """(row, position) of one of the step's tokens."""
        if token < decode.shape[1]:
            return int(decode[0, token]), int(decode[1, token])
        tile, offset = divmod(token - decode.shape[1], self.tile_size)
        row, start, length = prefill[:, tile].tolist()
        assert offset == length - 1
        return row, start + offset

    def _sample(self, rows: np.ndarray, after: np.ndarray, plan: StepPlan) -> np.ndarray:
        results = np.full(len(rows), -1)
        for i, sequence in enumerate(plan.sampling):
            assert rows[i] == sequence.row
            results[i] = next_token(after[i], *self.keys[sequence.row])
            position = self._position_after(plan, i)
            if sequence.group.beams is None and position < self.tokens.shape[1]:
                self.tokens[sequence.row, position] = results[i]
        return results

    @staticmethod
    def _position_after(plan: StepPlan, result: int) -> int:
        """Where a result's token goes."""
        if result < len(plan.rows):
            return int(plan.positions[result]) + 1
        return len(plan.sampling[result].tokens)

    def _candidates(self, plan: StepPlan, after: np.ndarray) -> Candidates | None:
        if not plan.beams:
            return None
        width = max(group.beams.num_candidates for group, _ in plan.beams)
        offered = [best_continuations(after[members], group.beams.scores, width) for group, members in plan.beams]
        return Candidates(*(np.stack(x) for x in zip(*offered, strict=True)))

    def _write(self, work: list[tuple[int, int, int]]) -> None:
        """Layer by layer, a step writes all its K and V before it attends."""
        written: set[int] = set()
        for row, start, end in work:
            chain = self._chains[row]
            del chain[start:]  # a wrong guess may stand there
            while len(chain) < end:
                chain.append(
                    self.prefixes.extend(chain[-1] if chain else Prefixes.EMPTY, int(self.tokens[row, len(chain)]))
                )
            for group in range(self.groups):
                slots = self._slots(row, start, end, group)
                assert (slots >= self.block_size).all(), f"row {row} writes to the null block"
                assert not written & set(slots.tolist()), f"row {row} writes where another one does"
                written.update(slots.tolist())
                self.pool[slots] = self._named(chain[start:end], group)

    def _check(self, row: int, start: int, end: int) -> None:
        for group, window in enumerate(self.windows):
            begin = max(start + 1 - window, 0)
            found = self.pool[self._slots(row, begin, end, group)].tolist()
            wanted = self._named(self._chains[row][begin:end], group)
            assert found == wanted, f"row {row} at {start}:{end} reads what is not its own"

    def _named(self, prefixes: list[int], group: int) -> list[int]:
        """What the layers of a group keep of tokens with these prefixes."""
        return [prefix * self.groups + group for prefix in prefixes]

    def _slots(self, row: int, start: int, end: int, group: int) -> np.ndarray:
        at = np.arange(start, end)
        entries = self.tables[row, at // self.block_size * self.groups + group]
        return entries * self.block_size + at % self.block_size


class NullEngine:
    """Add, abort and step, with every promise of the scheduler checked at every step.

    Args:
      num_blocks: that can be used, for each of the layer groups whose `windows` are given.
      max_tiles: tiles of the largest bucket; None: as many as the token budget holds.
      checked: False runs ten times faster: the device does not look, tokens mean nothing, and `check` is the
        caller's business.
      guesses: how many tokens are guessed at a time; with four tokens to guess among, many guesses are right.
      timed: False looks at nobody's waiting time, which takes as long as the queue is.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        rows: int,
        max_len: int,
        tile_size: int,
        budget: int,
        watermark: float = 0.01,
        caching: bool = True,
        max_tiles: int | None = None,
        checked: bool = True,
        timed: bool = True,
        swap_blocks: int = 0,
        preemption_mode: PreemptionMode = "auto",
        windows: Tokens[int | None] = (None,),
        guesses: int = 0,
    ) -> None:
        self.blocks = BlockManager(
            num_blocks * len(windows) + 1,
            block_size,
            rows,
            -(-max_len // block_size),
            watermark=watermark,
            enable_prefix_caching=caching,
            windows=windows,
            max_chunk=(max_tiles or budget // tile_size) * tile_size,
        )
        self.scheduler = Scheduler(
            self.blocks,
            make_buckets(max(rows, min(guesses + 1, budget)), max_tiles or budget // tile_size, tile_size),
            tile_size=tile_size,
            max_num_batched_tokens=budget,
            swap_blocks=swap_blocks,
            preemption_mode=preemption_mode,
            speculator=NgramSpeculator(guesses, longest=2, shortest=1) if guesses else None,
        )
        self.scheduler.sharing = SharingFinder(self.blocks, members=4, min_saved_tokens=1)
        self.max_len, self.budget, self.checked, self._timed = max_len, budget, checked, timed
        self.prefixes = Prefixes()
        self.device = Device(
            self.prefixes,
            rows=rows,
            max_len=max_len,
            num_blocks=num_blocks * len(windows) + 1,
            block_size=block_size,
            tile_size=tile_size,
            looks=checked,
            windows=windows,
        )
        self.groups: list[SequenceGroup] = []  # all that were ever added, by arrival
        self.num_steps = 0
        self.first_scheduled: list[SequenceGroup] = []
        self._deadlines: dict[SequenceGroup, int] = {}
        self._arrivals = itertools.count()
        self._in_flight: collections.deque[tuple[StepPlan, np.ndarray, Candidates | None]] = collections.deque()

    @property
    def unfinished(self) -> list[SequenceGroup]:
        return [g for g in self._deadlines if not g.finished]

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.has_work or self._in_flight)

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        n: int = 1,
        priority: int = 0,
        salt: str = "",
        stop: bool = False,
        prompt_logprobs: int | None = None,
        beams: bool = False,
    ) -> SequenceGroup:
        arrival = next(self._arrivals)
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=[STOP_TOKEN] if stop else [],
            use_beam_search=beams,
            temperature=0.0 if beams else 1.0,
        )
        group = SequenceGroup(
            f"request-{arrival}",
            None,
            prompt,
            params,
            seed=len(prompt) % 2,
            order=(priority, arrival),
            metrics=RequestMetrics(arrival_time=0.0),
            cache_salt=salt,
        )
        group.sequences = [
            Sequence(
                group, i, list(prompt), min(len(prompt) + max_tokens, self.max_len), frozenset(params.stop_token_ids)
            )
            for i in range(n)
        ]
        if beams:
            group.beams = new_search(group)
        self.scheduler.add(group)
        self.groups.append(group)
        self._set_deadlines(group)
        return group

    def _set_deadlines(self, group: SequenceGroup) -> None:
        if not self._timed:
            self._deadlines[group] = sys.maxsize
            return
        # Served in order, a group waits for those before it, and for those that run: each of their tokens, and their
        # ways in, cost at most a step for computing it and one for computing it again.
        first = [g for g in self.unfinished if g.order < group.order or g.status is Status.RUNNING]
        self._deadlines[group] = self.num_steps + sum(self._cost(g) for g in [*first, group])
        for other in self.unfinished:
            if other.order > group.order:
                self._deadlines[other] += self._cost(group)

    @staticmethod
    def _cost(group: SequenceGroup) -> int:
        return sum(2 * (s.max_length + 3) for s in group.unfinished)

    def abort(self, group: SequenceGroup) -> None:
        self.scheduler.abort(group)

    def step(self) -> list[Sequence]:
        """As LLMEngine._step. Returns the sequences that received a token."""
        self.num_steps += 1
        received = self._commit_first()
        before = {group: group.status for group in self.unfinished} if self.checked else {}
        plan = self.scheduler.schedule()
        if plan is not None:
            if self.checked:
                self._check_plan(plan, before)
            self.device.prepare(plan)
            for sequence in plan.admitted:
                self.device.admit(sequence, self.blocks.tables[sequence.row])
            self._in_flight.append((plan, *self.device.run(plan)))
        if self.checked:
            self.check()
        if len(self._in_flight) > 1 or (self._in_flight and plan is None):
            received += self._commit()
        return received

    def interrupt(self) -> list[Sequence]:
        """A step is planned, and something fails before it runs: a swap, an upload, the launch."""
        received = self._commit_first()
        self.scheduler.schedule()
        self.scheduler.preemption.preempt_all()
        self.blocks.reset_prefix_cache()
        while self._in_flight:
            received += self._commit()
        lost = sum(self._cost(g) for g in self.unfinished)
        for group in self.unfinished:
            self._deadlines[group] += lost
        if self.checked:
            self.check()
        return received

    def _commit_first(self) -> list[Sequence]:
        """Commits what must be known before the next step is planned."""
        return self._commit() if self._in_flight and self.scheduler.needs_results else []

    def _commit(self) -> list[Sequence]:
        plan, results, candidates = self._in_flight.popleft()
        received = self.scheduler.commit(plan, results[:, None], candidates)
        if self.checked:
            self.check()
        return received

    def drain(self) -> None:
        """Runs until everything has ended, within the deadlines, and nothing is held."""
        limit = self.num_steps + 2 + sum(self._cost(g) for g in self.unfinished)
        while self.has_work:
            assert self.num_steps <= limit, f"no end after {self.num_steps} steps: {self.unfinished}"
            self.step()
        assert not self.unfinished
        assert self.blocks.num_used == 0
        assert not self.blocks.tables.any()
        assert self.scheduler.batch.num_free == len(self.scheduler.batch.by_row)
        assert not self.scheduler.roster.variants
        assert not self.scheduler._admission.catching_up
        assert not self.scheduler._admission.followers
        assert self.scheduler.swap_space.num_used == 0

    # ------------------------------------------------------------------------------------------------ promises

    def check(self) -> None:
        self.blocks.check_invariants()
        assert all(self.scheduler.batch.by_row[s.row] is s for s in self.scheduler._admission.catching_up)
        for group in self.unfinished:
            assert self.num_steps <= self._deadlines[group], f"{group.request_id} starves"
            rows = [s.row for s in group.unfinished]
            assert all(r >= 0 for r in rows) if group.status is Status.RUNNING else all(r < 0 for r in rows)
        for group in [g for g in self._deadlines if g.finished]:
            del self._deadlines[group]

    def _check_plan(self, plan: StepPlan, before: dict[SequenceGroup, Status]) -> None:
        scheduler, blocks = self.scheduler, self.blocks
        tile_rows = [t.row for t in plan.tiles]
        assert len(plan.rows) + len(plan.tiles) * scheduler.tile_size <= self.budget, "over the token budget"
        lanes = list(zip(plan.rows.tolist(), plan.positions.tolist(), strict=True))
        assert len(set(lanes)) == len(lanes) <= plan.bucket.decode_rows
        assert plan.guesses or len(set(plan.rows.tolist())) == len(lanes)
        assert len(plan.tiles) <= plan.bucket.prefill_tiles
        assert not set(plan.rows.tolist()) & set(tile_rows), "a row in both lanes"
        assert [s.row for s in plan.sequences] == plan.rows.tolist()
        written = blocks.by_group[plan.rows, plan.positions // blocks.block_size]
        assert (blocks.allocator.refs[written] == 1).all(), "a shared block is written"
        running = scheduler.running
        assert sum(len(g.unfinished) for g in running) <= len(scheduler.batch.by_row)
        waiting = [g for g in self.unfinished if g.status is Status.WAITING]
        lost = [g for g, status in before.items() if status is Status.RUNNING and g.status is not Status.RUNNING]
        assert all(kept.order < group.order for group in lost for kept in running), "the newest are preempted"
        groups = [g for g in running if before[g] is Status.WAITING]
        assert all(g.order < w.order for g in groups for w in waiting), "admitted out of turn"
        assert [g.order for g in groups] == sorted(g.order for g in groups)
        assert not (lost and groups), "admitted what was about to be preempted"
        assert not (groups and scheduler.num_swapped), "swapped groups come first"
        assert not (plan.swaps_in and plan.swaps_out), "in and out in one step"
        if groups and len(running) > 1:
            assert blocks.num_free >= blocks.watermark_blocks, "admission went below the watermark"
        self.first_scheduled += [g for g in groups if g not in self.first_scheduled]

    def check_tables(self) -> None:
        """The device's block tables, made of admissions, forks and new blocks alone, are the host's."""
        if self.scheduler._edits:
            return  # forks that the device has not heard of yet
        for row, sequence in enumerate(self.scheduler.batch.by_row):
            if sequence is not None and self.blocks.counts[row]:  # a follower has no table yet
                here, there = self.blocks.tables[row], self.device.tables[row]
                indices, groups = np.divmod(np.arange(len(here)), self.device.groups)
                left = indices < self.blocks.firsts[row, groups]  # by a window: nobody's business
                assert ((here == there) | left).all()

    def expected(self, sequence: Sequence) -> list[int]:
        """The output that a sampled sequence has if nobody ends it early."""
        group, prefix, output = sequence.group, self._prefix(sequence.group.prompt_token_ids), []
        while len(group.prompt_token_ids) + len(output) < sequence.max_length:
            output.append(next_token(prefix, group.seed, sequence.index))
            if output[-1] in sequence.stop_token_ids:
                break
            prefix = self.prefixes.extend(prefix, output[-1])
        return output

    def expected_beams(self, group: SequenceGroup) -> list[list[int]]:
        """The outputs of a beam search that nobody ends early: `BeamSearch` without any rows and blocks."""
        search = new_search(dataclasses.replace(group, sequences=[group.sequences[0]] * group.params.n))
        start = self._prefix(group.prompt_token_ids)
        while not search.done:
            prefixes = [self._prefix([n.token for n in path(node)], start) for node in search.nodes]
            search.advance(*best_continuations(np.array(prefixes), search.scores, search.num_candidates))
        return [hypothesis.token_ids for hypothesis in search.best()]

    def _prefix(self, tokens: list[int], prefix: int = Prefixes.EMPTY) -> int:
        for token in tokens:
            prefix = self.prefixes.extend(prefix, token)
        return prefix

    def check_outputs(self) -> None:
        for group in self.groups:
            if group.beams is not None:
                if group.beams.done:  # not aborted
                    assert [s.output_token_ids for s in group.sequences] == self.expected_beams(group)
                continue
            for sequence in group.sequences:
                output, expected = sequence.output_token_ids, self.expected(sequence)
                if sequence.finish_reason is FinishReason.ABORT or sequence.stop_reason == "text":
                    assert output == expected[: len(output)]
                else:
                    assert output == expected
                    stopped = bool(output) and output[-1] in sequence.stop_token_ids
                    assert sequence.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
                    assert sequence.stop_reason == (STOP_TOKEN if stopped else None)
