"""Draft: a plan in the making. The scheduler fills it lane by lane; `finish` makes it a `StepPlan`."""

import dataclasses

import numpy as np

from jpaged.memory import Swapped
from jpaged.scheduling.batch import Batch
from jpaged.scheduling.plan import Bucket, Edits, StepPlan, SwapIn, Tile, Variant, logprob_width, smallest_bucket
from jpaged.scheduling.roster import Roster
from jpaged.scheduling.sharing import Piece
from jpaged.scheduling.speculation import Guesses, lanes
from jpaged.sequence import Sequence, SequenceGroup


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True)
class Draft:
    """What has been decided about the next step; fields as in `StepPlan`."""

    edits: Edits
    swaps_out: list[Swapped] = dataclasses.field(default_factory=list)
    swaps_in: list[SwapIn] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    preempted: bool = False
    rows: np.ndarray = dataclasses.field(default_factory=_none)
    new_blocks: np.ndarray = dataclasses.field(default_factory=lambda: _none().reshape(0, 1))
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    guesses: list[Guesses] = dataclasses.field(default_factory=list)
    shared: list[Piece] = dataclasses.field(default_factory=list)
    tiles: list[Tile] = dataclasses.field(default_factory=list)
    forked: dict[int, list[Sequence]] = dataclasses.field(default_factory=dict)
    """Number of a tile -> the sequences that draw their next token after it, besides the tile's own."""

    @property
    def num_drawing(self) -> int:
        """Sequences that draw a token after a tile."""
        return sum(1 + len(self.forked.get(i, ())) for i, tile in enumerate(self.tiles) if tile.samples)

    def positions(self, batch: Batch) -> np.ndarray:
        """Of the decode lane, int32 [d]: the rows' next tokens, then the guesses at those after them."""
        guessed = [position for _, position, _ in lanes(self.guesses)]
        first = batch.position[self.rows[: len(self.rows) - len(guessed)]]
        return np.concatenate([first, np.array(guessed, np.int32)])

    @property
    def empty(self) -> bool:
        """Whether the device has nothing to do: nothing to compute, to move, or to learn."""
        return not (len(self.rows) or self.tiles or self.swaps_out or self.swaps_in or self.admitted)

    def finish(self, batch: Batch, roster: Roster, buckets: tuple[Bucket, ...], tile_size: int) -> StepPlan:
        """Makes the plan, and moves the decode lane's rows one position on."""
        rows, positions = self.rows, self.positions(batch)
        batch.position[rows] += 1  # once, however many guesses a row has: `commit` knows how many were right
        self.edits.tokens += lanes(self.guesses)
        sequences: list[Sequence] = [batch.by_row[row] for row in rows.tolist()]  # type: ignore[misc]  # none is free
        sampling, after = list(sequences), list(range(len(rows)))
        for i, tile in enumerate(self.tiles):
            if tile.samples:
                drawing = [tile.sequence, *self.forked.get(i, ())]
                sampling += drawing
                after += [i * tile_size + tile.length - 1] * len(drawing)
        bucket = smallest_bucket(buckets, len(rows), len(self.tiles), len(sampling))
        result_tokens = np.array(after, np.int32)
        result_tokens[len(rows) :] += bucket.decode_rows
        variant = self._variant(roster)
        return StepPlan(
            bucket=bucket,
            variant=variant,
            swaps_out=self.swaps_out,
            swaps_in=self.swaps_in,
            edits=self.edits,
            admitted=self.admitted,
            copies=self.copies,
            sequences=sequences,
            rows=rows,
            positions=positions,
            new_blocks=self.new_blocks,
            tiles=self.tiles,
            sampling=sampling,
            shared=self.shared,
            guesses=self.guesses,
            result_rows=np.array([s.row for s in sampling], np.int32),
            result_tokens=result_tokens,
            beams=_beams(sampling, roster) if variant.num_beam_candidates else [],
        )

    def _variant(self, roster: Roster) -> Variant:
        variant = Variant()
        for group in {t.sequence.group for t in self.tiles}:
            if group.wants_prompt_logprobs:
                width = logprob_width(group.params.prompt_logprobs)
                variant = variant.union(Variant(prompt_logprobs=True, num_logprobs=width))
        for running in roster.variants:
            variant = variant.union(running)
        return variant


def _beams(sampling: list[Sequence], roster: Roster) -> list[tuple[SequenceGroup, list[int]]]:
    index = {sequence: i for i, sequence in enumerate(sampling)}
    searching = [g for g in roster.running if g.beams is not None and g.sequences[0] in index]
    return [(group, [index[s] for s in group.sequences]) for group in searching]
