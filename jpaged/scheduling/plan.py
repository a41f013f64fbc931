"""StepPlan: what one step does, as pure data; and the bucket (padded static shape) that it runs in.

    decode lane    one token for each of some rows              [row row row row  -   -   -   - ]
    prefill lane   tiles of `tile_size` tokens, a tile belongs to one row; a long chunk is several tiles
                                                                [row5 0:32][row5 32:64][row9 0:17 ....]

A step's tokens are the decode lane's followed by the tiles'. Packed into one int32 array for the device:

    rows[D] | positions[D] | new_blocks[D] | tile rows[P] | tile starts[P] | tile lengths[P] | tile samples[P]
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jpaged.sampling_params import MAX_LOGPROBS, SamplingParams
from jpaged.sequence import Sequence

LOGPROB_WIDTHS = (0, 5, MAX_LOGPROBS)
"""Numbers of log-probabilities that are compiled for; a request's number is rounded up."""


class Bucket(NamedTuple):
    """A static shape: every plan is padded to one of these, and each is compiled once."""

    decode_rows: int
    prefill_tiles: int

    @property
    def packed_size(self) -> int:
        return 3 * self.decode_rows + 4 * self.prefill_tiles

    @property
    def num_results(self) -> int:
        return self.decode_rows + self.prefill_tiles


class Variant(NamedTuple):
    """Which parts of the sampler a step needs; each combination that occurs is compiled once per bucket."""

    sample: bool = False
    """Some row draws at random; otherwise all are greedy."""
    truncate: bool = False
    """Some row has top_k, top_p or min_p."""
    penalties: bool = False
    rules: bool = False
    """Some row has logit_bias, allowed_token_ids, bad_words or min_tokens."""
    num_logprobs: int = -1
    """-1: none; 0: only the chosen token's; k: and the k most likely."""
    prompt_logprobs: bool = False

    def union(self, other: "Variant") -> "Variant":
        return Variant._make(max(a, b) for a, b in zip(self, other, strict=True))


def variant_of(params: SamplingParams) -> Variant:
    """What one request asks of the sampler (its prompt log-probabilities aside: those are a matter of tiles)."""
    return Variant(
        sample=not params.greedy,
        truncate=not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
        penalties=params.needs_penalties,
        rules=params.needs_rules,
        num_logprobs=logprob_width(params.logprobs),
    )


def logprob_width(wanted: int | None) -> int:
    """The compiled number of log-probabilities that serves so many; -1 for none."""
    return -1 if wanted is None else next(k for k in LOGPROB_WIDTHS if wanted <= k)


class Tile(NamedTuple):
    """Up to `tile_size` consecutive tokens of one sequence, computed in the prefill lane."""

    sequence: Sequence
    row: int
    start: int
    length: int
    samples: bool
    """Whether the sequence is caught up after this tile, so that its next token is sampled."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. The sequences are carried along so that `Scheduler.commit` knows whose tokens came back."""

    bucket: Bucket
    variant: Variant
    admitted: list[Sequence]
    """Sequences whose row was given to them in this step; their state must reach the device before it."""
    sequences: list[Sequence]
    """Of the decode lane, in order."""
    rows: np.ndarray  # int32 [d]
    positions: np.ndarray  # int32 [d]: of the token that is computed
    new_blocks: np.ndarray  # int32 [d]: block appended to the row's table for that token; 0 = none
    tiles: list[Tile]

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of `result_rows`."""
        return self.sequences + [t.sequence for t in self.tiles if t.samples]

    @property
    def result_rows(self) -> list[int]:
        """Where their results stand among the step's `bucket.num_results`."""
        first = self.bucket.decode_rows
        return [*range(len(self.rows)), *(first + i for i, t in enumerate(self.tiles) if t.samples)]

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return len(self.rows) + sum(t.length for t in self.tiles)

    def pack(self, null_row: int) -> np.ndarray:
        """The integers of the plan, int32 [bucket.packed_size]; padding points to `null_row`."""
        size, tiles = self.bucket
        packed = np.zeros(self.bucket.packed_size, np.int32)
        lanes = packed[: 3 * size].reshape(3, size)
        count = len(self.rows)
        lanes[0, :count] = self.rows
        lanes[0, count:] = null_row
        lanes[1, :count] = self.positions
        lanes[2, :count] = self.new_blocks
        if tiles:
            prefill = packed[3 * size :].reshape(4, tiles)
            prefill[0, :] = null_row
            for i, (_, row, start, length, samples) in enumerate(self.tiles):
                prefill[:, i] = row, start, length, samples
        return packed


def smallest_bucket(buckets: tuple[Bucket, ...], decode_rows: int, tiles: int) -> Bucket:
    """The cheapest bucket that holds so many rows and tiles; `buckets` is sorted by cost."""
    for bucket in buckets:
        if bucket.decode_rows >= decode_rows and bucket.prefill_tiles >= tiles:
            return bucket
    raise ValueError(f"no bucket holds {decode_rows} rows and {tiles} tiles")


def make_buckets(max_num_seqs: int, max_tiles: int, tile_size: int) -> tuple[Bucket, ...]:
    """The default shapes: about a dozen, whatever the limits.

    Decode-only steps are the many ones, so their lane has fine sizes; steps with a prefill lane are dominated
    by it, so two or three decode sizes and two tile counts are enough. Below 8 rows XLA:CPU takes as long as for 8.
    """
    sizes = (8, 16, 24, 32, 48) if max_num_seqs <= 64 else tuple(1 << i for i in range(3, 12))
    fine = [n for n in sizes if n < max_num_seqs][-5:]
    mixed_rows = {min(8, max_num_seqs), max_num_seqs} | ({-(-max_num_seqs // 2)} if max_num_seqs > 32 else set())
    tile_counts = {-(-max_tiles // 4), max_tiles}
    mixed = {Bucket(rows, tiles) for rows in mixed_rows for tiles in tile_counts}
    buckets = {Bucket(rows, 0) for rows in (1, *fine, max_num_seqs)} | mixed
    return tuple(sorted(buckets, key=lambda b: (b.decode_rows + b.prefill_tiles * tile_size, b)))
