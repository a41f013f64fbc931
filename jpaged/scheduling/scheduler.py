"""Scheduler: continuous batching at the level of single steps (paper, section 4.5).

There is no prefill phase and no decode phase: a sequence's `position` (the next token to compute) chases the
tokens that it has. If it is one behind, it takes a place in the decode lane; if it is further behind (a new
prompt, or one that is computed again after a preemption) it takes tiles of the prefill lane.

    waiting (by order) --admit: a row, blocks of all known tokens--> running --commit--> finished
        ^                                                               |
        +---------------- preempt the newest: blocks are short ---------+

`schedule` runs one step ahead of `commit`: when step N+1 is planned, step N's tokens are still on the device.
What is known without them is enough: positions advance by one. A sequence that turns out to have ended at
step N was computed once too often, and that result is dropped.
"""

import heapq
import time
from collections import Counter

import numpy as np

from jpaged.errors import InvalidRequestError
from jpaged.memory import BlockManager
from jpaged.scheduling.plan import Bucket, StepPlan, Tile, Variant, logprob_width, smallest_bucket, variant_of
from jpaged.sequence import NO_ROW, FinishReason, Sequence, SequenceGroup, Status


class Scheduler:
    """Decides what each step computes, and keeps every group moving.

    Args:
      blocks: the block manager; its rows are the batch's rows.
      buckets: the shapes that steps may have, cheapest first.
      tile_size: tokens of one tile of the prefill lane.
      max_num_batched_tokens: most tokens (padding of tiles included) in one step.

    Progress: groups are served in `order` (priority, then arrival). The first running group is never
    preempted for another one, and alone it always fits (checked by `add`), so it finishes.
    """

    def __init__(
        self, blocks: BlockManager, buckets: tuple[Bucket, ...], *, tile_size: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.buckets = buckets
        self.tile_size = tile_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_tiles = max(b.prefill_tiles for b in buckets)
        rows = blocks.tables.shape[0]
        # The batch, one entry a row. A row without a sequence has target 0 and end 0: never ready.
        self.position = np.zeros(rows, np.int32)  # next token to compute
        self.target = np.zeros(rows, np.int32)  # tokens known at admission: below it, prefill lane
        self.end = np.zeros(rows, np.int32)  # positions computed before the length limit ends the sequence
        self.by_row: list[Sequence | None] = [None] * rows
        self._free_rows = list(range(rows - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, int], SequenceGroup]] = []  # a heap; finished ones are skipped
        self.num_waiting = 0
        self.running: list[SequenceGroup] = []
        self._variants: Counter[Variant] = Counter()  # of the running groups
        self._catching_up: list[Sequence] = []  # running sequences with prefill work left, by order
        self.num_preemptions = 0
        self.tokens_lost = 0  # computed tokens that preemptions threw away

    @property
    def has_work(self) -> bool:
        return bool(self.num_waiting or self.running)

    @property
    def waiting(self) -> list[SequenceGroup]:
        """The groups that wait, the next to be admitted first."""
        waiting = (group for _, group in self._waiting if group.status is Status.WAITING)
        return sorted(waiting, key=lambda group: group.order)

    # ---------------------------------------------------------------------------------------------- requests

    def add(self, group: SequenceGroup) -> None:
        """Queues a group.

        Raises:
          InvalidRequestError: the group could never run, however long it waited.
        """
        rows, blocks = len(group.sequences), self.blocks
        if rows > len(self.by_row):
            raise InvalidRequestError(
                f"n={rows} sequences do not fit into max_num_seqs={len(self.by_row)}: "
                "ask for fewer samples or raise max_num_seqs."
            )
        need = sum(blocks.blocks_for(s.max_length - 1) for s in group.sequences)
        if need > blocks.allocator.num_usable:
            raise InvalidRequestError(
                f"the request may need {need} blocks of {blocks.block_size} tokens and the whole pool has "
                f"{blocks.allocator.num_usable}: lower max_tokens or n, shorten the prompt, or give the pool more "
                "memory (kv_cache_memory_bytes, num_gpu_blocks_override)."
            )
        self._queue(group)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence, in whatever state it is; its blocks are free for the next step."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self._vacate(sequence)
        group = sequence.group
        if not group.unfinished:
            if group.status is Status.RUNNING:
                self._stop_running(group)
            else:
                self.num_waiting -= 1
            group.status = Status.FINISHED

    def _queue(self, group: SequenceGroup) -> None:
        group.status = Status.WAITING
        heapq.heappush(self._waiting, (group.order, group))
        self.num_waiting += 1

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> StepPlan | None:
        """Plans the next step, or None if there is nothing that can be computed now."""
        rows, grown, preempted = self._schedule_decodes()
        budget = min(self.max_tiles, (self.max_num_batched_tokens - len(rows)) // self.tile_size)
        tiles: list[Tile] = []
        self._schedule_chunks(tiles, budget)
        admitted = [] if preempted else self._admit(tiles, budget)
        if not len(rows) and not tiles:
            return None
        positions = self.position[rows]
        self.position[rows] += 1
        by_row = self.by_row
        return StepPlan(
            bucket=smallest_bucket(self.buckets, len(rows), len(tiles)),
            variant=self._variant(tiles),
            admitted=admitted,
            sequences=[by_row[row] for row in rows.tolist()],  # type: ignore[misc]  # ready rows have a sequence
            rows=rows,
            positions=positions,
            new_blocks=grown[rows],
            tiles=tiles,
        )

    def _schedule_decodes(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Rows that are one token behind: (rows [d], block appended by row [max_rows], any preempted)."""
        preempted = False
        while True:
            rows = np.flatnonzero((self.position >= self.target) & (self.position < self.end)).astype(np.int32)
            full = rows[self.position[rows] == self.blocks.counts[rows] * self.blocks.block_size]
            if len(full) <= self.blocks.num_free:
                break
            self._preempt(max(self.running, key=lambda group: group.order))
            preempted = True
        grown = np.zeros(len(self.by_row), np.int32)
        if len(full):
            grown[full] = self.blocks.grow(full)
        return rows, grown, preempted

    def _schedule_chunks(self, tiles: list[Tile], budget: int) -> None:
        """Cuts the work of sequences that are behind into tiles, oldest first, until the budget is spent."""
        done = 0
        for sequence in self._catching_up:
            row = sequence.row
            start, target = int(self.position[row]), int(self.target[row])
            while start < target and len(tiles) < budget:
                length = min(self.tile_size, target - start)
                tiles.append(Tile(sequence, row, start, length, start + length == target))
                start += length
            self.position[row] = start
            self.blocks.seal(row, sequence.tokens, start)
            if start < target:
                break
            done += 1
        del self._catching_up[:done]

    def _admit(self, tiles: list[Tile], budget: int) -> list[Sequence]:
        """Starts waiting groups, in order, while rows, blocks and tiles last; stops at the first that must wait."""
        admitted: list[Sequence] = []
        while len(tiles) < budget and (group := self._peek()) is not None:
            sequences = group.unfinished
            if len(sequences) > len(self._free_rows) or not self._open(group, sequences):
                break
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            group.status = Status.RUNNING
            if group.metrics.first_scheduled_time is None:
                group.metrics.first_scheduled_time = time.monotonic()
            self.running.append(group)
            self._variants[variant_of(group.params)] += 1
            admitted += sequences
            self._catching_up += sequences
            self._schedule_chunks(tiles, budget)
        return admitted

    def _peek(self) -> SequenceGroup | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _open(self, group: SequenceGroup, sequences: list[Sequence]) -> bool:
        """Gives all sequences of a group rows and blocks, or none of them."""
        use_cache = group.params.prompt_logprobs is None
        # A group that would be alone may use the last block: nobody else needs room to grow.
        reserve = self.blocks.watermark_blocks if self.running else 0
        if len(sequences) > 1:  # all fit even without a prefix hit, or none is touched
            need = sum(self.blocks.blocks_for(len(s.tokens)) for s in sequences)
            if need + reserve > self.blocks.num_free:
                return False
        for sequence in sequences:
            row = self._free_rows[-1]
            cached = self.blocks.try_open(
                row, sequence.tokens, salt=group.cache_salt, use_cache=use_cache, reserve=reserve
            )
            if cached is None:
                return False
            sequence.row = self._free_rows.pop()
            self.by_row[row] = sequence
            self.position[row] = cached
            self.target[row] = len(sequence.tokens)
            self.end[row] = sequence.max_length - 1
            if sequence.num_output_tokens == 0:
                group.num_cached_tokens = cached
        return True

    def _variant(self, tiles: list[Tile]) -> Variant:
        variant = Variant()
        for group in {t.sequence.group for t in tiles}:
            if group.wants_prompt_logprobs:
                width = logprob_width(group.params.prompt_logprobs)
                variant = variant.union(Variant(prompt_logprobs=True, num_logprobs=width))
        for running in self._variants:
            variant = variant.union(running)
        return variant

    # ------------------------------------------------------------------------------------------------ commit

    def commit(self, plan: StepPlan, tokens: list[int]) -> list[Sequence]:
        """Appends the tokens that a step sampled, one for each of `plan.sampling`, and ends what has ended.

        Returns: the sequences that received a token. Those that ended before it was read drop it.
        """
        size, received = self.blocks.block_size, []
        for sequence, token in zip(plan.sampling, tokens, strict=True):
            if sequence.finish_reason is not None:
                continue
            known = sequence.tokens
            known.append(token)
            received.append(sequence)
            count = len(known)
            if token in sequence.stop_token_ids:
                asked_for = token in sequence.group.params.stop_token_ids
                self.finish(sequence, FinishReason.STOP, token if asked_for else None)
            elif count >= sequence.max_length:
                self.finish(sequence, FinishReason.LENGTH)
            elif (count - 1) % size == 0 and sequence.row != NO_ROW:
                self.blocks.seal(sequence.row, known, count - 1)
        return received

    # ------------------------------------------------------------------------------------ preemption, release

    def preempt_all(self) -> None:
        """Sends every running group back to the queue: a plan was made that will not run."""
        for group in list(self.running):
            self._preempt(group)

    def _preempt(self, group: SequenceGroup) -> None:
        """Takes all blocks of a group; it waits again and its tokens are computed anew (recompute)."""
        for sequence in group.unfinished:
            self.tokens_lost += int(self.position[sequence.row])
            self._vacate(sequence)
        self._stop_running(group)
        self.num_preemptions += 1
        group.metrics.num_preemptions += 1
        self._queue(group)

    def _stop_running(self, group: SequenceGroup) -> None:
        self.running.remove(group)
        variant = variant_of(group.params)
        self._variants[variant] -= 1
        if not self._variants[variant]:
            del self._variants[variant]

    def _vacate(self, sequence: Sequence) -> None:
        row = sequence.row
        if row == NO_ROW:
            return
        self.blocks.close(row)
        self.position[row] = self.target[row] = self.end[row] = 0
        self.by_row[row] = None
        self._free_rows.append(row)
        if sequence in self._catching_up:
            self._catching_up.remove(sequence)
        sequence.row = NO_ROW
