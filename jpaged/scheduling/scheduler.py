"""Scheduler: continuous batching at the level of single steps (paper, section 4.5).

There is no prefill phase and no decode phase: a sequence's `position` (the next token to compute) chases the
tokens that it has. If it is one behind, it takes a place in the decode lane; if it is further behind (a new
prompt, or one that is computed again after a preemption) it takes tiles of the prefill lane.

    waiting (by order) --admit: rows, blocks of all known tokens--> running --commit--> finished
        ^                                                           |     ^
        +---- recompute --- preempt the newest: blocks are short ---+     | swap in, before anyone is admitted
                                                                    +-> swapped

Sequences of a group that have the same tokens are computed once: one leads, the others follow it, and when the
leader has caught up they fork: they share all its blocks, and draw their next tokens from the same logits.

`schedule` runs one step ahead of `commit`: when step N+1 is planned, step N's tokens are still on the device.
What is known without them is enough: positions advance by one. A sequence that turns out to have ended at
step N was computed once too often, and that result is dropped. Beams are the exception (`needs_results`): who
continues whom decides about blocks.
"""

import time
from typing import Literal

import numpy as np

from jpaged.errors import InvalidRequestError
from jpaged.memory import BlockManager, SwapSpace
from jpaged.scheduling import beams
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.draft import Draft
from jpaged.scheduling.plan import Bucket, Edits, StepPlan, SwapIn, Tile
from jpaged.scheduling.roster import Roster
from jpaged.sequence import NO_ROW, FinishReason, Sequence, SequenceGroup, Status

PreemptionMode = Literal["auto", "swap", "recompute"]


class Scheduler:
    """Decides what each step computes, and keeps every group moving.

    Args:
      blocks: the block manager; its rows are the batch's rows.
      buckets: the shapes that steps may have, cheapest first.
      tile_size: tokens of one tile of the prefill lane.
      max_num_batched_tokens: most tokens (padding of tiles included) in one step.
      swap_blocks: blocks that host memory has room for.
      preemption_mode: what becomes of a preempted group's keys and values. auto: a single sequence's are computed
        anew, a group's are swapped out; either way, where the host has no room they are computed anew.

    Progress: groups are served in `order` (priority, then arrival). The first running group is never
    preempted for another one, and alone it always fits (checked by `add`), so it finishes.
    """

    def __init__(
        self,
        blocks: BlockManager,
        buckets: tuple[Bucket, ...],
        *,
        tile_size: int,
        max_num_batched_tokens: int,
        swap_blocks: int = 0,
        preemption_mode: PreemptionMode = "auto",
    ) -> None:
        self.blocks = blocks
        self.buckets = buckets
        self.tile_size = tile_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_tiles = max(b.prefill_tiles for b in buckets)
        self.swap_space = SwapSpace(blocks, swap_blocks)
        self.preemption_mode = preemption_mode
        self.batch = Batch(blocks.tables.shape[0])
        self.roster = Roster()
        self.num_preemptions = 0
        self.num_swaps_out = 0  # groups
        self.num_swaps_in = 0
        self.tokens_lost = 0  # computed tokens that preemptions threw away
        self._catching_up: list[Sequence] = []  # running sequences with prefill work left, by order
        self._followers: dict[Sequence, list[Sequence]] = {}  # of a leader that is catching up
        self._edits = Edits()  # decided by the last commit

    @property
    def has_work(self) -> bool:
        return bool(self.roster)

    @property
    def running(self) -> list[SequenceGroup]:
        return self.roster.running

    @property
    def num_waiting(self) -> int:
        return self.roster.num_waiting

    @property
    def num_swapped(self) -> int:
        return len(self.roster.swapped)

    @property
    def needs_results(self) -> bool:
        """Whether the next step can't be planned before the results of the last one are known."""
        return any(variant.num_beam_candidates for variant in self.roster.variants)

    # ---------------------------------------------------------------------------------------------- requests

    def add(self, group: SequenceGroup) -> None:
        """Queues a group.

        Raises:
          InvalidRequestError: the group could never run, however long it waited.
        """
        count, blocks = len(group.sequences), self.blocks
        if count > len(self.batch.by_row):
            raise InvalidRequestError(
                f"{count} sequences (n, best_of or beams) do not fit into max_num_seqs={len(self.batch.by_row)}: "
                "ask for fewer or raise max_num_seqs."
            )
        shared = len(group.prompt_token_ids) // blocks.block_size if count > 1 else 0
        need = shared + sum(blocks.blocks_for(s.max_length - 1) - shared for s in group.sequences)
        if need > blocks.allocator.num_usable:
            raise InvalidRequestError(
                f"the request may need {need} blocks of {blocks.block_size} tokens and the whole pool has "
                f"{blocks.allocator.num_usable}: lower max_tokens, n or the number of beams, shorten the prompt, or "
                "give the pool more memory (kv_cache_memory_bytes, num_gpu_blocks_override)."
            )
        self.roster.wait(group)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence, in whatever state it is; its blocks are free for the next step."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self._vacate(sequence)
        group = sequence.group
        if not group.unfinished:
            self._close(group)

    def abort(self, group: SequenceGroup) -> None:
        """Ends all sequences of a group, in whatever state it is."""
        if not group.finished:
            self._end(group)

    def _end(self, group: SequenceGroup) -> list[Sequence]:
        """Ends a group; its sequences keep what they have, those of a beam search the best there is."""
        for sequence in group.unfinished:
            self._vacate(sequence)
        if group.beams is not None:
            beams.write_best(group)
        for sequence in group.unfinished:
            sequence.finish_reason = FinishReason.ABORT
        self._close(group)
        return group.sequences

    def _close(self, group: SequenceGroup) -> None:
        if group.status is Status.SWAPPED:
            self.swap_space.forget(self.roster.swapped[group][0])
        self.roster.leave(group)

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> StepPlan | None:
        """Plans the next step, or None if there is nothing that can be computed now."""
        draft = Draft(self._edits)
        self._edits = Edits()
        self._swap_in(draft)
        self._schedule_decodes(draft)
        budget = min(self.max_tiles, (self.max_num_batched_tokens - len(draft.rows)) // self.tile_size)
        self._schedule_chunks(draft, budget)
        if not draft.preempted and not self.roster.swapped:
            self._admit(draft, budget)
        if draft.empty:
            return None
        return draft.finish(self.batch, self.roster, self.buckets, self.tile_size)

    def _schedule_decodes(self, draft: Draft) -> None:
        """Rows that are one token behind, each with a block of its own to write to."""
        while True:
            rows = self.batch.ready()
            writes = self.blocks.writes(rows, self.batch.position[rows])
            if writes.num_blocks > self.blocks.num_free:
                self.blocks.reclaim(writes.num_blocks)
            if writes.num_blocks <= self.blocks.num_free:
                break
            self._preempt(self.roster.newest_running(), draft)
        draft.rows = rows
        draft.new_blocks, draft.copies = self.blocks.make_writable(writes)

    def _schedule_chunks(self, draft: Draft, budget: int) -> None:
        """Cuts the work of sequences that are behind into tiles, oldest first, until the budget is spent."""
        done = 0
        for sequence in self._catching_up:
            row = sequence.row
            start, target = int(self.batch.position[row]), int(self.batch.target[row])
            samples = target == len(sequence.tokens)
            while start < target and len(draft.tiles) < budget:
                length = min(self.tile_size, target - start)
                draft.tiles.append(Tile(sequence, row, start, length, samples and start + length == target))
                start += length
            self.batch.position[row] = start
            self.blocks.seal(row, sequence.tokens, start)
            if start < target:
                break
            self._caught_up(sequence, draft)
            done += 1
        del self._catching_up[:done]

    def _caught_up(self, leader: Sequence, draft: Draft) -> None:
        """The leader's last tile is planned: those who follow it fork, and beams that have waited for it go on."""
        forked = self._followers.pop(leader, [])
        for sequence in forked:
            self.blocks.fork(leader.row, sequence.row)
            position = int(self.batch.position[leader.row])
            self.batch.start(sequence, position, position)
            draft.admitted.append(sequence)
        if forked:
            draft.forked[len(draft.tiles) - 1] = forked
        if leader.group.beams is not None:
            self._release_beams(leader.group)

    def _release_beams(self, group: SequenceGroup) -> None:
        """Beams advance together: none decodes before all have caught up."""
        batch, rows = self.batch, [s.row for s in group.sequences]
        if (batch.position[rows] >= batch.target[rows]).all():
            batch.end[rows] = group.sequences[0].max_length - 1

    def _admit(self, draft: Draft, budget: int) -> None:
        """Starts waiting groups, in order, while rows, blocks and tiles last; stops at the first that must wait."""
        while len(draft.tiles) < budget and (group := self.roster.next_waiting()) is not None:
            if len(group.unfinished) > self.batch.num_free or not self._open(group):
                break
            self.roster.run(group)
            if group.metrics.first_scheduled_time is None:
                group.metrics.first_scheduled_time = time.monotonic()
            draft.admitted += [s for s in group.unfinished if self.blocks.counts[s.row]]
            self._schedule_chunks(draft, budget)

    def _open(self, group: SequenceGroup) -> bool:
        """Gives all sequences of a group rows, and those that lead blocks; or nothing at all."""
        leaders: dict[tuple[int, ...] | None, list[Sequence]] = {}
        for sequence in group.unfinished:
            leaders.setdefault(tuple(sequence.tokens), []).append(sequence)
        heads = [sequences[0] for sequences in leaders.values()]
        followers = len(group.unfinished) - len(heads)
        # Whoever forks will soon write to a block of its own. A group that would be alone may use the last block.
        reserve = self.blocks.watermark_blocks + followers if self.running else 0
        use_cache = group.params.prompt_logprobs is None
        self.batch.seat(group.unfinished)
        tokens = [s.tokens for s in heads]
        opened = self._try_open([s.row for s in heads], tokens, group.cache_salt, use_cache, reserve)
        if opened is None:
            for sequence in reversed(group.unfinished):
                self.batch.vacate(sequence)
            return False
        apart = group.beams is not None and len(heads) > 1  # they go on together, each from its own last token
        for sequence, cached in zip(heads, opened, strict=True):
            target = len(sequence.tokens) - 1 if apart else len(sequence.tokens)
            self.batch.start(sequence, cached, target, held=apart)
            if cached < target:
                self._catching_up.append(sequence)
            if sequence.num_output_tokens == 0:
                group.num_cached_tokens = cached
        self._followers |= {s[0]: s[1:] for s in leaders.values() if len(s) > 1}
        if apart:
            self._release_beams(group)
        return True

    def _try_open(self, rows, tokens, salt: str, use_cache: bool, reserve: int) -> list[int] | None:
        """`BlockManager.try_open`, and again after parked tables have been reclaimed."""
        for _ in range(2):
            opened = self.blocks.try_open(rows, tokens, salt=salt, use_cache=use_cache, reserve=reserve)
            if opened is not None:
                return opened
            self.blocks.reclaim(sum(self.blocks.blocks_for(len(t)) for t in tokens) + reserve)
        return None

    # ------------------------------------------------------------------------------------------------ commit

    def commit(self, plan: StepPlan, results: np.ndarray, candidates: beams.Candidates | None = None) -> list[Sequence]:
        """Appends the tokens that a step sampled, and ends what has ended.

        Args:
          results: int32 [N, columns]: row i is about `plan.sampling[i]`, column 0 is its token.
          candidates: of the plan's beam groups.

        Returns: the sequences that received a token, or whose beam search ended. Those that ended before it was read
        drop it.
        """
        size, received = self.blocks.block_size, []
        tokens = results[: len(plan.sampling), 0].tolist()
        for sequence, token in zip(plan.sampling, tokens, strict=True):
            if sequence.finish_reason is not None or sequence.group.beams is not None:
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
        if candidates is not None:
            received += self._commit_beams(plan, results, candidates)
        return received

    def _commit_beams(self, plan: StepPlan, results: np.ndarray, candidates: beams.Candidates) -> list[Sequence]:
        ended: list[Sequence] = []
        for group, members, offered in beams.offers(plan, candidates):
            choices = beams.advance(group, members, results, offered)
            if beams.search_of(group).done:
                ended += self._end(group)
            else:
                beams.reorder(group, choices, self.blocks, self.batch.position, self._edits)
        return ended

    # ------------------------------------------------------------------------------- preemption, swapping, release

    def preempt_all(self) -> None:
        """Sends every running group back to the queue: a plan was made that will not run."""
        for group in list(self.running):
            self._preempt(group, None)
        for group, (swapped, _) in list(self.roster.swapped.items()):
            if swapped.contents is None:
                self._close(group)
                self.roster.wait(group)

    def _preempt(self, group: SequenceGroup, draft: Draft | None) -> None:
        """Takes all blocks of a group: to host memory if it may go there, else its tokens will be computed anew."""
        if group.beams is not None:
            beams.write_back(group)
        sequences = group.unfinished
        rows = [s.row for s in sequences]
        swapped = None
        if draft is not None:
            draft.preempted = True
            if self._may_swap(group, rows):
                swapped = self.swap_space.try_out(rows, self.batch.position[rows].tolist())
        if swapped is None:
            self.tokens_lost += int(self.batch.position[rows].sum())
        for sequence in sequences:
            self._vacate(sequence)
        self.num_preemptions += 1
        group.metrics.num_preemptions += 1
        if swapped is None or draft is None:
            self.roster.leave(group)
            self.roster.wait(group)
        else:
            draft.swaps_out.append(swapped)
            self.roster.swap(group, swapped, sequences)
            self.num_swaps_out += 1

    def _may_swap(self, group: SequenceGroup, rows: list[int]) -> bool:
        """Whether policy wants it swapped, and all of it has caught up: half a prompt is not worth the copies."""
        if self.preemption_mode == "recompute" or (self.preemption_mode == "auto" and len(rows) == 1):
            return False
        batch = self.batch
        return bool(((batch.position[rows] >= batch.target[rows]) & (batch.end[rows] > 0)).all())

    def _swap_in(self, draft: Draft) -> None:
        """Brings swapped groups back, in order, as long as what runs has blocks to grow."""
        while self.roster.swapped:
            group = self.roster.next_swapped()
            swapped, owners = self.roster.swapped[group]
            which = [i for i, s in enumerate(owners) if not s.finished]
            reserve = 0
            if self.running:
                reserve = self.blocks.watermark_blocks + len(which) + sum(len(g.unfinished) for g in self.running)
            need = self.swap_space.blocks_needed(swapped, which) + reserve
            if need > self.blocks.num_free:
                self.blocks.reclaim(need)
            if need > self.blocks.num_free or len(which) > self.batch.num_free:
                return
            sequences = [owners[i] for i in which]
            rows = self.batch.seat(sequences)
            draft.swaps_in.append(SwapIn(swapped, *self.swap_space.back_in(swapped, which, rows)))
            for i, sequence in zip(which, sequences, strict=True):
                self.batch.start(sequence, swapped.positions[i], swapped.positions[i])
            self.num_swaps_in += 1
            draft.admitted += sequences
            self.roster.run(group)

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.row == NO_ROW:
            return
        self.blocks.close(sequence.row)
        self.batch.vacate(sequence)
        self._followers.pop(sequence, None)
        if sequence in self._catching_up:
            self._catching_up.remove(sequence)
