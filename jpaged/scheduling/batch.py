"""Batch: the rows of the device's batch state, who has which, and how far each has come."""

import numpy as np

from jpaged.sequence import NO_ROW, Sequence


class Batch:
    """One entry a row, as columns, so that a step looks at all rows with a few NumPy calls.

    A row is one of

        free        nobody has it
        idle        reserved for a sequence that has nothing to compute yet (end = 0)
        behind      position < target: prefill lane
        ready       target <= position < end: one token a step, decode lane
    """

    def __init__(self, num_rows: int) -> None:
        self.position = np.zeros(num_rows, np.int32)  # next token to compute
        self.target = np.zeros(num_rows, np.int32)  # below it, prefill lane
        self.end = np.zeros(num_rows, np.int32)  # positions computed before the length limit ends the sequence
        self.by_row: list[Sequence | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def seat(self, sequences: list[Sequence]) -> list[int]:
        """Gives each sequence a free row, idle for now; returns the rows."""
        for sequence in sequences:
            sequence.row = self._free.pop()
            self.by_row[sequence.row] = sequence
        return [sequence.row for sequence in sequences]

    def start(self, sequence: Sequence, position: int, target: int, *, held: bool = False) -> None:
        """Puts a sequence to work at `position`; a held one stops at `target`."""
        row = sequence.row
        self.position[row], self.target[row] = position, target
        self.end[row] = 0 if held else sequence.max_length - 1

    def vacate(self, sequence: Sequence) -> None:
        row = sequence.row
        self.position[row] = self.target[row] = self.end[row] = 0
        self.by_row[row] = None
        self._free.append(row)
        sequence.row = NO_ROW

    def ready(self) -> np.ndarray:
        """The rows that are one token behind, int32 [d]."""
        return np.flatnonzero((self.position >= self.target) & (self.position < self.end)).astype(np.int32)
