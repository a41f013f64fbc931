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
step N was computed once too often, and that result is dropped. Beams and guesses are the exceptions
(`needs_results`): who continues whom decides about blocks, and what is known about what is guessed.
"""

import time

import numpy as np

from jpaged.errors import InvalidRequestError
from jpaged.memory import BlockManager, SwapSpace, Table
from jpaged.scheduling import beams
from jpaged.scheduling.admission import Admission
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.draft import Draft
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.scheduling.plan import Bucket, Edits, StepPlan, Tile
from jpaged.scheduling.preemption import Preemption, PreemptionMode
from jpaged.scheduling.roster import Roster
from jpaged.scheduling.sharing import SharingFinder
from jpaged.scheduling.speculation import Speculation
from jpaged.sequence import NO_ROW, FinishReason, Sequence, SequenceGroup


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
      speculator: guesses tokens, which steps check where they have lanes to spare.

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
        speculator: NgramSpeculator | None = None,
    ) -> None:
        self.blocks = blocks
        self.buckets = buckets
        self.tile_size = tile_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_tiles = max(b.prefill_tiles for b in buckets)
        self.batch = Batch(blocks.tables.shape[0])
        self._all_rows = np.arange(blocks.tables.shape[0])
        self.roster = Roster()
        self._admission = self.make_admission()
        self.swap_space = SwapSpace(blocks, swap_blocks)
        self.preemption = Preemption(blocks, self.batch, self.roster, self._admission, self.swap_space, preemption_mode)
        self._edits = Edits()  # decided by the last commit
        self.sharing = SharingFinder(blocks, buckets[0].piece_members)
        self.speculator = speculator
        most = max(b.decode_rows for b in buckets)
        self._speculation = None if speculator is None else Speculation(blocks, self.batch, speculator, most)

    def make_admission(self) -> Admission:
        """How groups get rows and blocks; for schedulers that reserve them otherwise."""
        return Admission(self.blocks, self.batch)

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
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of the groups that wait."""
        return self.roster.num_waiting_tokens

    @property
    def num_swapped(self) -> int:
        return len(self.roster.swapped)

    @property
    def num_preemptions(self) -> int:
        return self.preemption.num_preemptions

    @property
    def num_swaps_out(self) -> int:
        """Groups that left for host memory."""
        return self.preemption.num_swaps_out

    @property
    def num_swaps_in(self) -> int:
        """Groups that came back from there."""
        return self.preemption.num_swaps_in

    @property
    def tokens_lost(self) -> int:
        """Computed tokens that preemptions threw away."""
        return self.preemption.tokens_lost

    @property
    def needs_results(self) -> bool:
        """Whether the next step can't be planned before the results of the last one are known."""
        return self.speculator is not None or any(v.num_beam_candidates for v in self.roster.variants)

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
        need = self._most_blocks(group)
        if need > (usable := blocks.allocator.num_usable - blocks.parked.num_pinned):
            raise InvalidRequestError(
                f"the request may need {need} blocks of {blocks.block_size} tokens and the whole pool has "
                f"{usable}: lower max_tokens, n or the number of beams, shorten the prompt, or "
                "give the pool more memory (kv_cache_memory_bytes, num_gpu_blocks_override)."
            )
        self.roster.wait(group)

    def _most_blocks(self, group: SequenceGroup) -> int:
        """Blocks that a group needs at its longest: only the full blocks of its prompt are certain to be shared.

        Windows count for a single sequence. Those of a larger group may, after a preemption, be given blocks for all of
        their tokens before these are computed anew.
        """
        size, sequences = self.blocks.block_size, group.unfinished
        if len(sequences) == 1:
            return self.blocks.most_blocks(sequences[0].max_length - 1)
        shared = self.blocks.blocks_for(len(group.prompt_token_ids) // size * size)
        return shared + sum(self.blocks.blocks_for(s.max_length - 1) - shared for s in sequences)

    def pin(self, table: Table) -> None:
        """Pins the full blocks of a parked table: they are never reclaimed.

        Raises:
          InvalidRequestError: a request that waits or runs might then never fit.
        """
        blocks = self.blocks
        blocks.parked.truncate(table, table.num_computed // blocks.block_size * blocks.block_size)
        table.pinned = True
        left = blocks.allocator.num_usable - blocks.parked.num_pinned
        need = max((self._most_blocks(group) for group in self.roster.unfinished), default=1)
        if need > left:
            table.pinned = False
            raise InvalidRequestError(
                f"with these blocks pinned, {left} of the pool are left, and a request may need {need}: pin less, or "
                "give the pool more memory (kv_cache_memory_bytes, num_gpu_blocks_override)."
            )

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence, in whatever state it is; its blocks are free for the next step."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        sequence.weights_version = self.blocks.weights_version
        self._admission.vacate(sequence, park=True)
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
            self._admission.vacate(sequence, park=True)
            sequence.weights_version = self.blocks.weights_version
        if group.beams is not None:
            beams.write_best(group)
        for sequence in group.unfinished:
            sequence.finish_reason = FinishReason.ABORT
        self._close(group)
        return group.sequences

    def _close(self, group: SequenceGroup) -> None:
        self.preemption.forget(group)
        self.roster.leave(group)

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> StepPlan | None:
        """Plans the next step, or None if there is nothing that can be computed now."""
        draft = Draft(self._edits)
        self._edits = Edits()
        self.blocks.slide(self._all_rows, self.batch.position)
        self.preemption.swap_in(draft)
        self._schedule_decodes(draft)
        self._schedule_chunks(draft)
        if not draft.preempted and not self.roster.swapped:
            self._admit(draft)
        if draft.empty:
            return None
        if self._speculation is not None:
            self._speculation.add(draft, self.max_num_batched_tokens - len(draft.tiles) * self.tile_size)
        draft.shared = self.sharing.find(draft.rows, draft.positions(self.batch))
        return draft.finish(self.batch, self.roster, self.buckets, self.tile_size)

    def _schedule_decodes(self, draft: Draft) -> None:
        """Rows that are one token behind, each with a block of its own to write to; and the first of those that are
        further behind can go on, too."""
        while True:
            rows = self.batch.ready()
            writes = self.blocks.writes(rows, self.batch.position[rows])
            first = [s.row for s in self._admission.catching_up[:1]]
            need = writes.num_blocks + sum(self.blocks.lacking(row, int(self.batch.position[row])) for row in first)
            if need > self.blocks.num_free:
                self.blocks.parked.reclaim(need)
            if need <= self.blocks.num_free:
                break
            self.preemption.preempt(self.roster.newest_running(), draft)
        draft.rows = rows
        draft.new_blocks, draft.copies = self.blocks.make_writable(writes)

    def _schedule_chunks(self, draft: Draft) -> None:
        """Cuts the work of sequences that are behind into tiles, oldest first, until the budget is spent."""
        done, catching_up = 0, self._admission.catching_up
        for sequence in catching_up:
            row = sequence.row
            start, target = int(self.batch.position[row]), int(self.batch.target[row])
            samples = target == len(sequence.tokens)
            if self.blocks.extend(row, start):
                draft.admitted.append(sequence)  # the device has to hear of its new blocks
            end = min(target, self.blocks.covered(row))
            while start < end and self._tiles_left(draft) > 0:
                length = min(self.tile_size, end - start)
                draft.tiles.append(Tile(sequence, row, start, length, samples and start + length == target))
                start += length
            self.batch.position[row] = start
            self.blocks.seal(row, sequence.tokens, start)
            if start < target:
                break
            self._admission.caught_up(sequence, draft)
            done += 1
        del catching_up[:done]

    def _admit(self, draft: Draft) -> None:
        """Starts waiting groups, in order, while rows, blocks and tiles last; stops at the first that must wait."""
        while self._tiles_left(draft) > 0 and (group := self.roster.next_waiting()) is not None:
            # Whoever forks will soon write to a block of its own. A group that would be alone may use the last block.
            forks = (len(group.unfinished) - 1) * self.blocks.num_groups
            reserve = self.blocks.watermark_blocks + forks if self.running else 0
            if not self._admission.try_admit(group, draft, reserve=reserve):
                break
            self.roster.run(group)
            if group.metrics.first_scheduled_time is None:
                group.metrics.first_scheduled_time = time.monotonic()
            self._schedule_chunks(draft)
            self._admission.decode_at_once(group, draft, self._tiles_left(draft) * self.tile_size)

    def _tiles_left(self, draft: Draft) -> int:
        """Tiles that the step still has room for."""
        most = (self.max_num_batched_tokens - len(draft.rows)) // self.tile_size
        return min(self.max_tiles, most) - len(draft.tiles)

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
        guessed = plan.guessed
        for i, (sequence, token) in enumerate(zip(plan.sampling, tokens, strict=True)):
            if sequence.finish_reason is not None or sequence.group.beams is not None:
                continue
            known = sequence.tokens
            if i in guessed:
                if guessed[i] != (len(known) - 1, known[-1]):
                    continue  # a guess was wrong
                self.batch.position[sequence.row] += 1
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
        if self._speculation is not None:
            self._speculation.learn(plan)
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
