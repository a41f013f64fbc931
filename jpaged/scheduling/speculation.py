"""Speculation: guesses at a sequence's next tokens, which a step checks all at once (prompt lookup decoding).

    known      ... the cat sat on the mat , and the cat         the last tokens stood there before: what came next?
    guessed                                        sat on the
    one step   computes "cat sat on the", draws the token after each: "sat on a ..": two guesses were right

A guess takes a lane of its own beside its sequence's row: the same row at the next position. What is drawn after a
wrong guess is dropped; its keys and values are overwritten when their position comes. Draws depend on the position
alone (DESIGN, contract 8), so the tokens are those that would have been drawn without.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jpaged.memory import BlockManager
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.sequence import Sequence

if TYPE_CHECKING:
    from jpaged.scheduling.draft import Draft
    from jpaged.scheduling.plan import StepPlan


class Guesses(NamedTuple):
    """What one row is computed on besides its last token."""

    row: int
    position: int
    """Of the first."""
    tokens: list[int]


def lanes(guesses: list[Guesses]) -> Iterator[tuple[int, int, int]]:
    """(row, position, token) of each guess."""
    for row, position, tokens in guesses:
        for offset, token in enumerate(tokens):
            yield row, position + offset, token


class Speculation:
    """Gives rows of a step lanes for guesses, and learns from what becomes of them.

    Args:
      max_lanes: of the decode lane.
    """

    def __init__(self, blocks: BlockManager, batch: Batch, speculator: NgramSpeculator, max_lanes: int) -> None:
        self._blocks, self._batch, self._speculator, self._max_lanes = blocks, batch, speculator, max_lanes

    def add(self, draft: "Draft", budget: int) -> None:
        """Lets rows of the decode lane go several tokens on, as far as lanes and blocks are there to spare.

        Args:
          budget: most tokens of the decode lane.
        """
        left = min(self._max_lanes - draft.num_drawing, budget) - len(draft.rows)
        spare = self._blocks.watermark_blocks + len(draft.rows) * self._blocks.num_groups
        for row in draft.rows.tolist():
            guesses = self._guess(row, draft.admitted, left, spare)
            if guesses.tokens:
                draft.guesses.append(guesses)
                left -= len(guesses.tokens)
        if draft.guesses:
            rows = np.array([row for row, _, _ in lanes(draft.guesses)], np.int32)
            draft.rows = np.concatenate([draft.rows, rows])
            # Lanes of one row write the same entries of its table: each must bring what stands there.
            entries = self._blocks.by_group[draft.rows, draft.positions(self._batch) // self._blocks.block_size]
            fresh = np.concatenate([draft.new_blocks, np.zeros_like(entries[len(draft.new_blocks) :])])
            draft.new_blocks = np.where(np.isin(draft.rows, rows)[:, None], entries, fresh)

    def _guess(self, row: int, admitted: list[Sequence], left: int, spare: int) -> Guesses:
        """Guesses for one row; none if it was just admitted, as its tokens are uploaded after the guesses."""
        sequence: Sequence = self._batch.by_row[row]  # type: ignore[assignment]  # no row is free
        position = int(self._batch.position[row]) + 1
        most = min(left, int(self._batch.end[row]) - position)
        tokens = self._speculator.guess(sequence, most) if most > 0 and sequence not in admitted else []
        if tokens:
            tokens = tokens[: self._blocks.grow(row, position + len(tokens) - 1, spare) - position]
        return Guesses(row, position, tokens)

    def learn(self, plan: "StepPlan") -> None:
        """Looks at which of a committed step's guesses were right."""
        for row, position, tokens in plan.guesses:
            sequence = plan.sequences[int(np.flatnonzero(plan.rows == row)[0])]
            accepted = min(len(sequence.tokens) - position - 1, len(tokens))
            self._speculator.learn(sequence, len(tokens), accepted)
