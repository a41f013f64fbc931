"""The paper's baselines (section 6.1) behind the engine's own interface: a BlockManager and Schedulers.

    Orca                 iteration level; a sequence's whole room is reserved at admission; never preempts
      Max                  the model's longest sequence
      Pow2                 the prompt and the output's true length, rounded up to a power of two
      Oracle               the prompt and the output's true length
    FasterTransformer    request level: a batch runs until its longest output ends

`LLMEngine` runs them as it runs jpaged's own: they plan with the same `StepPlan`s, and the rows' tables are whole when
they are admitted. What they know of the output's length is `Sequence.max_length`, which is the true length where
outputs are forced to it (`ignore_eos`), as in the paper's benchmark. Groups of several sequences work in the simulation
alone: a plan has no room for a whole prompt's copies, and on the device a forked beam's table becomes its parent's.
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np

from benchmarks.paper.buddy import BuddyAllocator
from jpaged.errors import InvalidRequestError
from jpaged.memory import BlockManager
from jpaged.memory.row_tables import Writes
from jpaged.scheduling import Scheduler, StepPlan, beams
from jpaged.scheduling.admission import Admission
from jpaged.scheduling.draft import Draft
from jpaged.sequence import FinishReason, Sequence, SequenceGroup

Estimate = Callable[[int, int, int], int]
"""(prompt tokens, output tokens, longest sequence) -> tokens to reserve."""


def reserve_max(prompt: int, output: int, longest: int) -> int:
    return longest


def reserve_pow2(prompt: int, output: int, longest: int) -> int:
    return min(prompt + (1 << (output - 1).bit_length()), longest)


def reserve_oracle(prompt: int, output: int, longest: int) -> int:
    return min(prompt + output, longest)


class ReservingBlockManager(BlockManager):
    """A row's blocks are one contiguous chunk, for all that it may ever hold. Nothing is shared: a fork is a copy.

    The copies are part of the next step, before it writes.

    Args:
      max_len: tokens of the longest sequence; the largest chunk holds one.
    """

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_len: int) -> None:
        chunk = BuddyAllocator.chunk_size(-(-max_len // block_size))
        super().__init__(num_blocks, block_size, max_rows, chunk, watermark=0.0, enable_prefix_caching=False)
        self.allocator: BuddyAllocator = BuddyAllocator(num_blocks, chunk)  # type: ignore[assignment]
        self.wanted = 0
        """Tokens that `try_open` sets aside for each row."""
        self.reserved_tokens = np.zeros(max_rows, np.int64)
        """Of each row: what its estimate asked for, before blocks and chunks round it up."""
        self._chunks: dict[int, range] = {}  # by row
        self._filled = np.zeros(max_rows, np.int32)  # of each row: blocks that hold tokens
        self._copies: list[tuple[int, int]] = []

    def fits(self, count: int, tokens: int) -> bool:
        """Whether `count` chunks of so many tokens each can be had together."""
        return self.allocator.fits([self.blocks_for(tokens)] * count)

    def reserve(self, row: int, tokens: int) -> None:
        """Sets a chunk aside for a row that has none. The caller asked `fits`."""
        self._chunks[row] = self.allocator.allocate_chunk(self.blocks_for(tokens))
        self.reserved_tokens[row] = tokens

    def try_open(
        self,
        rows: Tokens[int],
        tokens: Tokens[Tokens[int]],
        *,
        salt: str = "",
        findable: int | None = None,
        reserve: int = 0,
    ) -> list[int]:
        """Gives each row a chunk of `wanted` tokens; nothing is found anywhere. The caller asked `fits`."""
        for row, known in zip(rows, tokens, strict=True):
            self.reserve(row, self.wanted)
            self._occupy(row, self.blocks_for(len(known)))
        return [0] * len(rows)

    def fork(self, source: int, row: int) -> None:
        """Copies a row's blocks to the chunk of another, which is set aside now if it has none."""
        if row not in self._chunks:
            self.reserve(row, int(self.reserved_tokens[source]))
        filled = int(self._filled[source])
        self._occupy(row, filled)
        self._copies += zip(self.tables[source, :filled].tolist(), self.tables[row, :filled].tolist(), strict=True)

    def close(self, row: int) -> None:
        chunk = self._chunks.pop(row, None)
        if chunk is not None:
            self._copies = [copy for copy in self._copies if copy[1] not in chunk]
            self.allocator.free_chunk(chunk[0])
        self.reserved_tokens[row] = 0
        self.clear(row)

    def writes(self, rows: np.ndarray, positions: np.ndarray) -> Writes:
        self._filled[rows] = positions // self.block_size + 1
        return super().writes(rows, positions)

    def make_writable(self, writes: Writes) -> tuple[np.ndarray, list[tuple[int, int]]]:
        new, copies = super().make_writable(writes)
        copies, self._copies = copies + self._copies, []
        return new, copies

    def _occupy(self, row: int, filled: int) -> None:
        self.lay(row, self._chunks[row], b"", [])
        self._filled[row] = filled


class ReservingAdmission(Admission):
    """Gives a group the room that its scheduler reserves for it, or nothing at all."""

    def __init__(self, scheduler: "OrcaScheduler") -> None:
        super().__init__(scheduler.blocks, scheduler.batch)
        self._scheduler, self._pool = scheduler, scheduler.blocks

    def try_admit(self, group: SequenceGroup, draft: Draft, *, reserve: int) -> bool:
        sequences, tokens = group.unfinished, self._scheduler.reservation(group)
        if not self._scheduler.may_start(group) or not self._pool.fits(len(sequences), tokens):
            return False
        self._pool.wanted = tokens
        if not super().try_admit(group, draft, reserve=reserve):
            return False
        for sequence in sequences:
            if not self._pool.counts[sequence.row]:  # it will fork from another when the prompt has been computed
                self._pool.reserve(sequence.row, tokens)
        return True


class OrcaScheduler(Scheduler):
    """First come, first served; a group starts when the room of all its sequences can be reserved.

    Args:
      blocks: a ReservingBlockManager.
      estimate: how much a sequence reserves.
      longest: tokens of the longest sequence that the model can have.
    """

    blocks: ReservingBlockManager

    def __init__(self, *args, estimate: Estimate, longest: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.estimate, self.longest = estimate, longest

    def make_admission(self) -> Admission:
        return ReservingAdmission(self)

    def reservation(self, group: SequenceGroup) -> int:
        """Tokens that each of a group's sequences reserves."""
        prompt = len(group.prompt_token_ids)
        return self.estimate(prompt, group.sequences[0].max_length - prompt, self.longest)

    def add(self, group: SequenceGroup) -> None:
        """Queues a group.

        Raises:
          InvalidRequestError: the group could never run, however long it waited.
        """
        pool, tokens = self.blocks.allocator, self.reservation(group)
        chunks = [self.blocks.blocks_for(tokens)] * len(group.sequences)
        if not BuddyAllocator(pool.num_blocks, pool.max_chunk).fits(chunks):
            raise InvalidRequestError(
                f"{len(chunks)} chunks of {tokens} tokens are more than the pool has: lower max_tokens or n, or give "
                "the pool more memory."
            )
        super().add(group)

    def may_start(self, group: SequenceGroup) -> bool:
        """Whether it is a group's turn, once its room can be reserved."""
        return True


class FasterTransformerScheduler(OrcaScheduler):
    """Batches of whole requests: the earliest ones start together, and all end when the longest one does.

    A member whose own output is complete is computed on to no purpose, as in FasterTransformer; the tokens are dropped.
    Outputs are delivered when the batch ends. Every member reserves what the longest needs.

    Args:
      max_batch: most sequences of a batch.
      max_tokens: a batch ends before the request with which its longest prompt and its longest output exceed it.
    """

    def __init__(self, *args, max_batch: int, max_tokens: int = 2040, longest: int, **kwargs) -> None:
        super().__init__(*args, estimate=reserve_oracle, longest=longest, **kwargs)
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self._members: set[SequenceGroup] = set()
        self._output = 0  # tokens of the batch's longest output

    def reservation(self, group: SequenceGroup) -> int:
        return min(len(group.prompt_token_ids) + max(self._output, _output_of(group)), self.longest)

    def schedule(self) -> StepPlan | None:
        if not self.running:
            self._form_batch()
        plan = super().schedule()
        for sequence in plan.admitted if plan is not None else ():
            self.batch.end[sequence.row] = self.reservation(sequence.group) - 1
        return plan

    def _form_batch(self) -> None:
        self._members, self._output = set(), 0
        count = prompt = 0
        for group in self.roster.waiting:
            count += len(group.unfinished)
            prompt, output = max(prompt, len(group.prompt_token_ids)), max(self._output, _output_of(group))
            too_much = count > self.max_batch or prompt + output > self.max_tokens
            if self._members and too_much:
                break
            self._members.add(group)
            self._output = output

    def may_start(self, group: SequenceGroup) -> bool:
        return group in self._members

    def commit(self, plan: StepPlan, results: np.ndarray, candidates: beams.Candidates | None = None) -> list[Sequence]:
        """Appends the sampled tokens to the outputs that are not complete; ends all when the last one is.

        Returns: the sequences that received a token, or that ended. (So an output that has been complete for a while is
        given one log-probability too many, if it wants any.)
        """
        received = []
        for sequence, token in zip(plan.sampling, results[: len(plan.sampling), 0].tolist(), strict=True):
            if not sequence.finished and _end_of(sequence) is None:
                sequence.tokens.append(token)
                received.append(sequence)
        ends = [(s, _end_of(s)) for group in self.running for s in group.unfinished]
        if all(end is not None for _, end in ends):
            for sequence, end in ends:
                self.finish(sequence, *end)
            received = list(dict.fromkeys([*received, *(s for s, _ in ends)]))
        return received


def _output_of(group: SequenceGroup) -> int:
    return group.sequences[0].max_length - len(group.prompt_token_ids)


def _end_of(sequence: Sequence) -> tuple[FinishReason, int | None] | None:
    """Why a sequence's output is complete: (reason, stop token that the request named); None if it is not."""
    if sequence.num_output_tokens and (token := sequence.tokens[-1]) in sequence.stop_token_ids:
        return FinishReason.STOP, token if token in sequence.group.params.stop_token_ids else None
    return (FinishReason.LENGTH, None) if len(sequence.tokens) >= sequence.max_length else None
