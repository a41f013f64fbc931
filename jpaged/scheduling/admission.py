"""Admission: how a waiting group gets rows and blocks, and what its sequences do until they have caught up.

Sequences with the same tokens are computed once: one leads, the others follow it and fork when it has caught up.
Sequences with different tokens (a group that was preempted) are each computed, sharing blocks where they begin alike.
"""

import numpy as np

from jpaged.memory import BlockManager
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.draft import Draft
from jpaged.sequence import NO_ROW, Sequence, SequenceGroup


class Admission:
    """Brings groups into the batch.

    Args:
      blocks, batch: where their blocks and rows come from.
    """

    def __init__(self, blocks: BlockManager, batch: Batch) -> None:
        self._blocks, self._batch = blocks, batch
        self.catching_up: list[Sequence] = []
        """Sequences of the batch with prefill work left, by order."""
        self.followers: dict[Sequence, list[Sequence]] = {}
        """Of a leader that is catching up."""

    def try_admit(self, group: SequenceGroup, draft: Draft, *, reserve: int) -> bool:
        """Gives all sequences of a group rows, and those that lead blocks; or nothing at all.

        Args:
          reserve: blocks that must stay free for others.
        """
        sequences = group.unfinished
        teams = _equals(sequences)
        apart = group.beams is not None and len(teams) > 1  # they go on together, each from its own last token
        if apart:
            teams = [[sequence] for sequence in sequences]
        heads = [team[0] for team in teams]
        if len(sequences) > self._batch.num_free:
            return False
        self._batch.seat(sequences)
        positions = self._open(group, heads, draft, reserve)
        wanted = self._blocks.blocks_to_open([len(s.tokens) for s in heads]) + reserve
        if positions is None and self._blocks.parked.reclaim(wanted):  # parked tables were in the way, perhaps
            positions = self._open(group, heads, draft, reserve)
        if positions is None:
            for sequence in reversed(sequences):
                self._batch.vacate(sequence)
            return False
        if heads[0].num_output_tokens == 0:
            group.num_cached_tokens = positions[0]
        self.followers |= {team[0]: team[1:] for team in teams if len(team) > 1}
        self._start(group, heads, positions, apart)
        draft.admitted += heads
        return True

    def _open(self, group: SequenceGroup, heads: list[Sequence], draft: Draft, reserve: int) -> list[int] | None:
        """Where each head begins to compute, once it has its blocks; None if they are short."""
        table = heads[0].parked_table  # a session's: the only sequence of its group
        if table is not None and not self._blocks.parked.can_resume(table, len(heads[0].tokens)):
            self._blocks.parked.release(table)
            table = None
        if table is not None:
            opened = self._blocks.parked.try_unpark(table, heads[0].row, len(heads[0].tokens), reserve)
            if opened is None:
                return None
            position, copies = opened
            heads[0].holder.table = None  # type: ignore[union-attr]  # it was the holder's
            draft.copies += copies
            return [position]
        tokens = [s.tokens for s in heads]
        return self._blocks.try_open(
            [s.row for s in heads], tokens, salt=group.cache_salt, findable=group.findable, reserve=reserve
        )

    def _start(self, group: SequenceGroup, heads: list[Sequence], positions: list[int], apart: bool) -> None:
        waiting = False  # for heads before it, who may compute what it shares: those catch up in order
        for sequence, position in zip(heads, positions, strict=True):
            last = len(sequence.tokens) - 1
            # One token behind and nobody to fork: that is the decode lane's work.
            alone = position == last and not (waiting or sequence in self.followers or group.reads_prompt)
            target = last if apart or alone else last + 1
            self._batch.start(sequence, position, target, held=apart)
            if position < target:
                self.catching_up.append(sequence)
                waiting = True
        if apart:
            self._release_beams(group)

    def caught_up(self, leader: Sequence, draft: Draft) -> None:
        """The leader's last tile is planned: those who follow it fork, and beams that have waited for it go on."""
        forked = self.followers.pop(leader, [])
        position = int(self._batch.position[leader.row])
        for sequence in forked:
            self._blocks.fork(leader.row, sequence.row)
            self._batch.start(sequence, position, position)
        if forked:
            draft.admitted += forked
            draft.forked[len(draft.tiles) - 1] = forked
        if leader.group.beams is not None:
            self._release_beams(leader.group)

    def _release_beams(self, group: SequenceGroup) -> None:
        """Beams advance together: none decodes before all have caught up."""
        batch, rows = self._batch, [s.row for s in group.sequences]
        if (batch.position[rows] >= batch.target[rows]).all():
            batch.end[rows] = group.sequences[0].max_length - 1

    def decode_at_once(self, group: SequenceGroup, draft: Draft, room: int) -> None:
        """Adds those of a group just admitted who are one token behind to the step's decode lane, if it has room."""
        batch = self._batch
        rows = np.array([s.row for s in group.unfinished], np.int32)
        rows = rows[(batch.position[rows] >= batch.target[rows]) & (batch.position[rows] < batch.end[rows])]
        if 0 < len(rows) <= room and group not in {t.sequence.group for t in draft.tiles}:
            draft.rows = np.concatenate([draft.rows, rows])
            none = np.zeros((len(rows), self._blocks.num_groups), np.int32)
            draft.new_blocks = np.concatenate([draft.new_blocks, none])

    def vacate(self, sequence: Sequence, *, park: bool = False) -> None:
        """Takes a sequence's row and blocks, if it has any.

        Args:
          park: the blocks of a sequence that a session holds are parked instead of released.
        """
        if sequence.row == NO_ROW:
            return
        if park and sequence.holder is not None:
            computed = min(int(self._batch.position[sequence.row]), len(sequence.tokens))
            sequence.holder.table = self._blocks.parked.park(sequence.row, computed)
        else:
            self._blocks.close(sequence.row)
        self._batch.vacate(sequence)
        self.followers.pop(sequence, None)
        if sequence in self.catching_up:
            self.catching_up.remove(sequence)


def _equals(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Sequences that have the same tokens, together."""
    if len(sequences) == 1:
        return [sequences]
    teams: dict[tuple[int, ...], list[Sequence]] = {}
    for sequence in sequences:
        teams.setdefault(tuple(sequence.tokens), []).append(sequence)
    return list(teams.values())
