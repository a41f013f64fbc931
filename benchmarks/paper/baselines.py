"""The paper's baselines (section 6.1) behind the engine's own interface: a BlockManager and Schedulers.

    Orca                 iteration level; a sequence's whole room is reserved at admission; never preempts
      Max                  the model's longest sequence
      Pow2                 the prompt and the output's true length, rounded up to a power of two
      Oracle               the prompt and the output's true length
    FasterTransformer    request level: a batch runs until its longest output ends

`LLMEngine` runs them as it runs jpaged's own: they plan with the same `StepPlan`s, and the rows' tables are whole when
they are admitted. What they know of the output's length is `Sequence.max_length`, which is the true length where
outputs are forced to it (`ignore_eos`), as in the paper's benchmark.
"""

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Tokens

from benchmarks.paper.buddy import BuddyAllocator
from jpaged.errors import InvalidRequestError
from jpaged.memory import BlockManager
from jpaged.scheduling import Scheduler, StepPlan
from jpaged.sequence import FinishReason, Sequence, SequenceGroup, Status

Estimate = Callable[[int, int, int], int]
"""(prompt tokens, output tokens, longest sequence) -> tokens to reserve."""


def reserve_max(prompt: int, output: int, longest: int) -> int:
    return longest


def reserve_pow2(prompt: int, output: int, longest: int) -> int:
    return min(prompt + (1 << (output - 1).bit_length()), longest)


def reserve_oracle(prompt: int, output: int, longest: int) -> int:
    return min(prompt + output, longest)


class ReservingBlockManager(BlockManager):
    """A row's blocks are one contiguous chunk, for all that it may ever hold. Nothing is shared or grown.

    Args:
      max_len: tokens of the longest sequence; the largest chunk holds one.
    """

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_len: int) -> None:
        chunk = BuddyAllocator.chunk_size(-(-max_len // block_size))
        super().__init__(num_blocks, block_size, max_rows, chunk, watermark=0.0, enable_prefix_caching=False)
        self.allocator: BuddyAllocator = BuddyAllocator(num_blocks, chunk)  # type: ignore[assignment]
        self.reserved_tokens: list[int] = [0] * max_rows
        """Of each row: what its estimate asked for, before blocks and chunks round it up."""
        self._wanted: list[int] = []

    def fits(self, tokens: list[int]) -> bool:
        """Whether chunks of so many tokens each can be had together."""
        return self.allocator.fits(self.blocks_for(n) for n in tokens)

    def want(self, tokens: list[int]) -> None:
        """The next `try_open`s reserve so many tokens, in this order."""
        self._wanted = tokens[::-1]

    def try_open(
        self, row: int, tokens: Tokens[int], *, salt: str = "", use_cache: bool = True, reserve: int = 0
    ) -> int | None:
        reserved = self._wanted.pop()
        chunk = self.allocator.allocate_chunk(self.blocks_for(reserved))
        self.tables[row, : len(chunk)] = chunk
        self.counts[row] = len(chunk)
        self.reserved_tokens[row] = reserved
        return 0

    def close(self, row: int) -> None:
        count = int(self.counts[row])
        if count:
            self.allocator.free_chunk(int(self.tables[row, 0]))
        self.tables[row, :count] = 0
        self.counts[row] = self.reserved_tokens[row] = 0


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

    def reservation(self, sequence: Sequence) -> int:
        prompt = len(sequence.group.prompt_token_ids)
        return self.estimate(prompt, sequence.max_length - prompt, self.longest)

    def add(self, group: SequenceGroup) -> None:
        """Queues a group.

        Raises:
          InvalidRequestError: the group could never run, however long it waited.
        """
        empty = BuddyAllocator(self.blocks.allocator.num_blocks, self.blocks.allocator.max_chunk)
        if not empty.fits(self.blocks.blocks_for(self.reservation(s)) for s in group.sequences):
            raise InvalidRequestError(
                f"{len(group.sequences)} chunks of {self.reservation(group.sequences[0])} tokens are more than the "
                "pool has: lower max_tokens or n, or give the pool more memory."
            )
        super().add(group)

    def _open(self, group: SequenceGroup, sequences: list[Sequence]) -> bool:
        tokens = [self.reservation(s) for s in sequences]
        if not self.blocks.fits(tokens):
            return False
        self.blocks.want(tokens)
        return super()._open(group, sequences)


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
        self._batch: set[SequenceGroup] = set()
        self._output = 0  # tokens of the batch's longest output

    def reservation(self, sequence: Sequence) -> int:
        prompt = len(sequence.group.prompt_token_ids)
        return min(prompt + max(self._output, sequence.max_length - prompt), self.longest)

    def schedule(self) -> StepPlan | None:
        if not self.running:
            self._form_batch()
        return super().schedule()

    def _form_batch(self) -> None:
        self._batch, self._output, prompt = set(), 0, 0
        earliest = heapq.nsmallest(self.max_batch, (item for item in self._waiting if item[1].status is Status.WAITING))
        count = 0
        for _, group in earliest:
            count += len(group.unfinished)
            prompt = max(prompt, len(group.prompt_token_ids))
            output = max(self._output, *(s.max_length - len(s.group.prompt_token_ids) for s in group.unfinished))
            alone = not self._batch  # can't be cut any smaller
            if not alone and (count > self.max_batch or prompt + output > self.max_tokens):
                break
            self._batch.add(group)
            self._output = output

    def _open(self, group: SequenceGroup, sequences: list[Sequence]) -> bool:
        if group not in self._batch or not super()._open(group, sequences):
            return False
        for sequence in sequences:
            self.end[sequence.row] = self.reservation(sequence) - 1
        return True

    def commit(self, plan: StepPlan, tokens: list[int]) -> list[Sequence]:
        """Appends the sampled tokens to the outputs that are not complete; ends all when the last one is."""
        received = []
        for sequence, token in zip(plan.sampling, tokens, strict=True):
            if not sequence.finished and _end_of(sequence) is None:
                sequence.tokens.append(token)
                received.append(sequence)
        ends = [(s, _end_of(s)) for group in self.running for s in group.unfinished]
        if all(end is not None for _, end in ends):
            for sequence, end in ends:
                self.finish(sequence, *end)
        return received


def _end_of(sequence: Sequence) -> tuple[FinishReason, int | None] | None:
    """Why a sequence's output is complete: (reason, stop token that the request named); None if it is not."""
    if sequence.num_output_tokens and (token := sequence.tokens[-1]) in sequence.stop_token_ids:
        return FinishReason.STOP, token if token in sequence.group.params.stop_token_ids else None
    return (FinishReason.LENGTH, None) if len(sequence.tokens) >= sequence.max_length else None
