"""Preemption: who gives way when blocks are short, and how those who did come back (paper, section 4.5).

The blocks of a preempted group leave for host memory and return, or its tokens are computed again later.
"""

import logging
from typing import Literal

from jpaged import logs
from jpaged.memory import BlockManager, SwapSpace
from jpaged.scheduling import beams
from jpaged.scheduling.admission import Admission
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.draft import Draft
from jpaged.scheduling.plan import SwapIn
from jpaged.scheduling.roster import Roster
from jpaged.sequence import SequenceGroup, Status

log = logging.getLogger("jpaged.scheduler")

PreemptionMode = Literal["auto", "swap", "recompute"]


class Preemption:
    """Takes blocks from groups, and gives swapped groups theirs back.

    Args:
      blocks, batch, roster, admission: of the scheduler.
      swap_space: room for blocks in host memory.
      mode: see `Scheduler`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        batch: Batch,
        roster: Roster,
        admission: Admission,
        swap_space: SwapSpace,
        mode: PreemptionMode,
    ) -> None:
        self._blocks, self._batch, self._roster, self._admission = blocks, batch, roster, admission
        self.swap_space = swap_space
        self._mode = mode
        self.num_preemptions = 0
        self.num_swaps_out = 0  # groups
        self.num_swaps_in = 0
        self.tokens_lost = 0  # computed tokens that preemptions threw away

    def preempt_all(self, *, swapped_too: bool = False) -> None:
        """Sends every running group back to the queue, where its tokens will be computed anew.

        Args:
          swapped_too: also those whose blocks are in host memory; those whose blocks never got there go in any case.
        """
        for group in list(self._roster.running):
            self.preempt(group, None)
        for group, (swapped, _) in list(self._roster.swapped.items()):
            if swapped_too or swapped.contents is None:
                self.forget(group)
                self._roster.leave(group)
                self._roster.wait(group)

    def preempt(self, group: SequenceGroup, draft: Draft | None) -> None:
        """Takes all blocks of a group: to host memory if it may go there, else its tokens will be computed anew."""
        if group.beams is not None:
            beams.write_back(group)
        sequences = group.unfinished
        rows = [s.row for s in sequences]
        swapped = None
        if draft is not None:
            draft.preempted = True
            if self._may_swap(group, rows):
                swapped = self.swap_space.try_out(rows, self._batch.position[rows].tolist())
        lost = int(self._batch.position[rows].sum()) if swapped is None else 0
        self.tokens_lost += lost
        how = "recompute" if swapped is None else "swap"
        logs.report(log, "preemption", request_id=group.request_id, how=how, tokens_lost=lost)
        for sequence in sequences:
            self._admission.vacate(sequence)
        self.num_preemptions += 1
        group.metrics.num_preemptions += 1
        if swapped is None or draft is None:
            self._roster.leave(group)
            self._roster.wait(group)
        else:
            draft.swaps_out.append(swapped)
            self._roster.swap(group, swapped, sequences)
            self.num_swaps_out += 1

    def _may_swap(self, group: SequenceGroup, rows: list[int]) -> bool:
        """Whether policy wants it swapped, and all of it has caught up: half a prompt is not worth the copies."""
        if self._mode == "recompute" or (self._mode == "auto" and len(rows) == 1):
            return False
        batch = self._batch
        return bool(((batch.position[rows] >= batch.target[rows]) & (batch.end[rows] > 0)).all())

    def swap_in(self, draft: Draft) -> None:
        """Brings swapped groups back, in order, as long as what runs has blocks to grow."""
        while self._roster.swapped:
            group = self._roster.next_swapped()
            swapped, owners = self._roster.swapped[group]
            which = [i for i, s in enumerate(owners) if not s.finished]
            reserve, running = 0, self._roster.running
            if running:
                writers = len(which) + sum(len(g.unfinished) for g in running)
                reserve = self._blocks.watermark_blocks + writers * self._blocks.num_groups
            need = self.swap_space.blocks_needed(swapped, which) + reserve
            if need > self._blocks.num_free:
                self._blocks.parked.reclaim(need)
            if need > self._blocks.num_free or len(which) > self._batch.num_free:
                return
            sequences = [owners[i] for i in which]
            rows = self._batch.seat(sequences)
            draft.swaps_in.append(SwapIn(swapped, *self.swap_space.back_in(swapped, which, rows)))
            for i, sequence in zip(which, sequences, strict=True):
                self._batch.start(sequence, swapped.positions[i], swapped.positions[i])
            self.num_swaps_in += 1
            draft.admitted += sequences
            self._roster.run(group)

    def forget(self, group: SequenceGroup) -> None:
        """A group has ended, or must compute everything anew: gives up its room in host memory."""
        if group.status is Status.SWAPPED:
            self.swap_space.forget(self._roster.swapped[group][0])
