"""StepPlan: what one step does, as pure data; and the bucket (padded static shape) that it runs in.

    decode lane    one token for each of some rows              [row row row row  -   -   -   - ]
    prefill lane   tiles of `tile_size` tokens, a tile belongs to one row; a long chunk is several tiles
                                                                [row5 0:32][row5 32:64][row9 0:17 ....]

A step's tokens are the decode lane's followed by the tiles'. Its results are the tokens that it samples, each from
the logits after one of its tokens: a group's samples all draw their first token after the last one of their prompt.

Packed into one int32 array for the device (N = D + P; G layer groups, each with blocks of its own):

    rows[D] | positions[D] | new_blocks[G, D] || tile rows[P] | tile starts[P] | tile lengths[P] ||
    result rows[N] | result tokens[N] || copy sources[G * N] | copy destinations[G * N] | number of copies ||
    shared pieces: members [S], blocks

Everything that a step does besides computing stands in the plan too, in the order in which it is done
(DESIGN, contract 5): blocks swapped out, swapped in, rows edited and admitted, blocks copied on write.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from jpaged.memory import Swapped
from jpaged.sampling_params import MAX_LOGPROBS, SamplingParams
from jpaged.scheduling.sharing import MEMBERS, Piece, fewest_members
from jpaged.scheduling.speculation import Guesses, lanes
from jpaged.sequence import Sequence, SequenceGroup

LOGPROB_WIDTHS = (0, 5, MAX_LOGPROBS)
"""Numbers of log-probabilities that are compiled for; a request's number is rounded up."""


class Bucket(NamedTuple):
    """A static shape: every plan is padded to one of these, and each is compiled once."""

    decode_rows: int
    prefill_tiles: int
    piece_members: int = MEMBERS
    """Rows of the decode lane whose shared blocks are read together, at most."""

    def packed_size(self, groups: int) -> int:
        """Of a plan, for so many layer groups."""
        return _ends(self, groups)[-1]

    @property
    def num_pieces(self) -> int:
        """Such pieces, at most."""
        return self.decode_rows // fewest_members(self.piece_members)

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
    num_beam_candidates: int = 0
    """Continuations that a beam search is offered; 0: nobody searches."""
    structured: bool = False
    """Some row's tokens are masked by its grammar."""

    def union(self, other: "Variant") -> "Variant":
        return Variant._make(max(a, b) for a, b in zip(self, other, strict=True))

    def covers(self, other: "Variant") -> bool:
        """Whether it does all that the other one does."""
        return self.union(other) == self


def variant_of(group: SequenceGroup) -> Variant:
    """What one request asks of the sampler."""
    if group.beams is None:
        return sampling_variant(group.params)
    candidates = 1 << (group.beams.num_candidates - 1).bit_length()
    return sampling_variant(group.params)._replace(num_beam_candidates=candidates)


def sampling_variant(params: SamplingParams) -> Variant:
    """What parameters ask of the sampler, prompt log-probabilities (a matter of tiles) and beams aside."""
    return Variant(
        sample=not params.greedy,
        truncate=not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
        penalties=params.needs_penalties,
        rules=params.needs_rules,
        structured=params.structured_outputs is not None,
        num_logprobs=logprob_width(0 if params.ranks_samples and params.logprobs is None else params.logprobs),
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


class SwapIn(NamedTuple):
    """Blocks that come back from host memory."""

    swapped: Swapped
    indices: np.ndarray  # int32 [n]: which of `swapped.blocks`
    blocks: np.ndarray  # int32 [n]: where they go in the pool


@dataclasses.dataclass(slots=True)
class Edits:
    """Changes to rows that are on the device already: what the host has decided."""

    forks: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(source, row): the row's tokens and block table become the source's."""
    tokens: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """(row, position, token), after the forks: beams' tokens, and guesses."""

    def __bool__(self) -> bool:
        return bool(self.forks or self.tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. The sequences are carried along so that `Scheduler.commit` knows whose tokens came back."""

    bucket: Bucket
    variant: Variant
    swaps_out: list[Swapped]
    swaps_in: list[SwapIn]
    edits: Edits
    admitted: list[Sequence]
    """Sequences whose row was given to them in this step; their state must reach the device before it."""
    copies: list[tuple[int, int]]
    """Blocks copied on write: (source, destination)."""
    sequences: list[Sequence]
    """Of the decode lane, in order; one with guesses stands there several times."""
    rows: np.ndarray  # int32 [d]
    positions: np.ndarray  # int32 [d]: of the token that is computed
    new_blocks: np.ndarray  # int32 [d, G]: blocks that are new in the row's table at that token; 0 = none
    tiles: list[Tile]
    sampling: list[Sequence]
    """The sequences that get a token from this step, if what was guessed before it is right; result i is that of
    sampling[i]."""
    result_rows: np.ndarray  # int32 [n]
    result_tokens: np.ndarray  # int32 [n]: after which of the step's tokens each is sampled
    shared: list[Piece]
    """Rows of the decode lane that begin with the same blocks, in the first layer group."""
    guesses: list[Guesses]
    """The last lanes of the decode lane: rows that stand there already, one guessed token further each."""
    beams: list[tuple[SequenceGroup, list[int]]]
    """Groups whose beams take a step, and which results are their beams', by rank."""

    @property
    def guessed(self) -> dict[int, tuple[int, int]]:
        """Results that hold only if a guess was right: number -> (position, token) of that guess."""
        first = len(self.rows) - sum(len(g.tokens) for g in self.guesses)
        return {first + i: (position, token) for i, (_, position, token) in enumerate(lanes(self.guesses))}

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return len(self.rows) + sum(t.length for t in self.tiles)

    def pooling_weights(self, tile_size: int) -> np.ndarray | None:
        """What each tile's tokens count in the pooled hidden state of their prompt, float32 [bucket.prefill_tiles, C].

        None: nobody pools.
        """
        if not any(tile.sequence.group.readout.pooling for tile in self.tiles):
            return None
        weights = np.zeros((self.bucket.prefill_tiles, tile_size), np.float32)
        for row, tile in zip(weights, self.tiles, strict=False):
            group = tile.sequence.group
            left = len(group.prompt_token_ids) - tile.start  # of the prompt, from the tile's first token on
            if group.readout.pooling == "mean":
                row[: max(0, min(left, tile.length))] = 1 / len(group.prompt_token_ids)
            elif group.readout.pooling == "last" and 0 < left <= tile.length:
                row[left - 1] = 1
        return weights

    def pack(self, null_row: int) -> np.ndarray:
        """The integers of the plan, int32 [bucket.packed_size(G)]; padding points to `null_row`."""
        groups = self.new_blocks.shape[1]
        packed = np.zeros(self.bucket.packed_size(groups), np.int32)
        decode, prefill, results, copies, num_copies, pieces = split_packed(packed, self.bucket, groups)
        count = len(self.rows)
        decode[0, :count] = self.rows
        decode[0, count:] = null_row
        decode[1, :count] = self.positions
        decode[2:, :count] = self.new_blocks.T
        if self.bucket.prefill_tiles:
            prefill[0, :] = null_row
            for i, (_, row, start, length, _) in enumerate(self.tiles):
                prefill[:, i] = row, start, length
        count = len(self.result_rows)
        results[0, :count] = self.result_rows
        results[0, count:] = null_row
        results[1, :count] = self.result_tokens
        if self.copies:
            copies[:, : len(self.copies)] = np.array(self.copies, np.int32).T
            num_copies[:] = len(self.copies)
        for piece, (members, num_blocks) in zip(pieces, self.shared, strict=False):  # those that save most come first
            piece[: len(members)] = members
            piece[len(members) : -1] = -1
            piece[-1] = num_blocks
        return packed


@functools.cache
def _ends(bucket: Bucket, groups: int) -> tuple[int, ...]:
    """Where the parts of a packed plan end."""
    sizes = (
        (2 + groups) * bucket.decode_rows,
        3 * bucket.prefill_tiles,
        2 * bucket.num_results,
        2 * groups * bucket.num_results,
        1,
        bucket.num_pieces * (bucket.piece_members + 1),
    )
    return tuple(itertools.accumulate(sizes))


def split_packed(packed, bucket: Bucket, groups: int):
    """The parts of a packed plan, NumPy's or JAX's, for so many layer groups.

    Returns: decode lane [2 + G, D], prefill lane [3, P], results [2, N], copies [2, G * N], number of copies [1],
    pieces [pieces, S + 1].
    """
    a, b, c, d, e, f = _ends(bucket, groups)
    return (
        packed[:a].reshape(2 + groups, -1),
        packed[a:b].reshape(3, -1),
        packed[b:c].reshape(2, -1),
        packed[c:d].reshape(2, -1),
        packed[d:e],
        packed[e:f].reshape(bucket.num_pieces, bucket.piece_members + 1),
    )


def smallest_bucket(buckets: tuple[Bucket, ...], decode_rows: int, tiles: int, results: int) -> Bucket:
    """The cheapest bucket that holds so many rows, tiles and results; `buckets` is sorted by cost."""
    for bucket in buckets:
        if bucket.decode_rows >= decode_rows and bucket.prefill_tiles >= tiles and bucket.num_results >= results:
            return bucket
    raise ValueError(f"no bucket holds {decode_rows} rows, {tiles} tiles and {results} results")


def make_buckets(max_num_seqs: int, max_tiles: int, tile_size: int, piece_members: int = MEMBERS) -> tuple[Bucket, ...]:
    """The default shapes: about a dozen, whatever the limits.

    Decode-only steps are the many ones, so their lane has fine sizes; steps with a prefill lane are dominated
    by it, so two or three decode sizes and two tile counts are enough. Below 8 rows XLA:CPU takes as long as for 8, and
    for 24 longer than for 32.
    """
    fine = [n for n in (1 << i for i in range(3, 12)) if n < max_num_seqs][-5:]
    mixed_rows = {min(8, max_num_seqs), max_num_seqs} | ({-(-max_num_seqs // 2)} if max_num_seqs > 32 else set())
    tile_counts = {-(-max_tiles // 4), max_tiles}
    mixed = {Bucket(rows, tiles, piece_members) for rows in mixed_rows for tiles in tile_counts}
    buckets = {Bucket(rows, 0, piece_members) for rows in (1, *fine, max_num_seqs)} | mixed
    return tuple(sorted(buckets, key=lambda b: (b.decode_rows + b.prefill_tiles * tile_size, b)))
