"""Sequence and SequenceGroup: what a request is while the engine works on it.

  add               admit (rows, blocks)               stop, length, abort
------> WAITING --------------------------> RUNNING ------------------------> FINISHED
           ^                                |    ^                                ^
           +---- preempt by recompute ------+    |                                |
                                            |    | swap in                        |
                              SWAPPED <-----+    |                                |
                                 |  preempt by swapping           abort in any state
                                 +---------------+
"""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jpaged.memory import Table
from jpaged.outputs import LogprobsAt, RequestMetrics
from jpaged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jpaged.scheduling.beam_search import BeamSearch
    from jpaged.scheduling.ngrams import Ngrams
    from jpaged.structured import Matcher

NO_ROW = -1
Pooling = Literal["last", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    """What a request wants of its prompt, beside the tokens that follow it."""

    pooling: Pooling | None = None
    """The output brings an `embedding`: the prompt's final hidden states, pooled. "mean" needs all of them: the prefix
    cache is not looked at."""
    scored_from: int = 0
    """With prompt_logprobs: the first position that gets them. What is before it may be found in the prefix cache."""
    generates: bool = True
    """Whether anybody looks at the tokens that follow; if not, they are counted nowhere."""


"""How the hidden states of a prompt's tokens become one: the last token's, or the mean of all."""


class Status(enum.Enum):
    WAITING = 0
    RUNNING = 1
    SWAPPED = 2
    FINISHED = 3


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclasses.dataclass(eq=False, slots=True)
class Holder:
    """Keeps a sequence's blocks between its runs: a session's end of a parked table."""

    table: Table | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens of a group."""

    group: "SequenceGroup"
    index: int
    """Which sample of its group; part of its random key."""
    tokens: list[int]
    """The prompt and what has been generated and read back so far."""
    max_length: int
    """Most tokens, prompt included."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end it: the model's end-of-sequence tokens (unless ignored) and the request's own."""
    row: int = NO_ROW
    """Its place in the batch while it runs."""
    matcher: "Matcher | None" = None
    """How far it is in its grammar; None: its output may have any form."""
    ngrams: "Ngrams | None" = None
    """What speculation knows of its tokens."""
    holder: Holder | None = None
    """Gets its blocks when it ends; None: they are released."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    weights_version: int | None = None
    """Under which weights it ended."""
    logprobs: list[LogprobsAt] = dataclasses.field(default_factory=list)
    cumulative_logprob: float = 0.0
    score: float | None = None
    """Of a beam search's result: its length-penalised log-probability."""
    chosen: list[Any] = dataclasses.field(default_factory=list)
    """Of a beam search's result: what its log-probabilities are made from."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def parked_table(self) -> Table | None:
        """Blocks that it has before it has a row; a table that was reclaimed counts for nothing."""
        table = None if self.holder is None else self.holder.table
        return None if table is None or not table.num_computed else table

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.group.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.group.prompt_token_ids) :]


@dataclasses.dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request: admitted, preempted and resumed together (DESIGN, contract 7)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """64 bits: the root of the group's random keys."""
    order: tuple[int, int]
    """(priority, arrival): smaller is served first and preempted last."""
    metrics: RequestMetrics
    cache_salt: str = ""
    status: Status = Status.WAITING
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[LogprobsAt | None] | None = None
    bypasses_cache: bool = False
    """All its positions are computed, whatever the prefix cache holds."""
    readout: Readout = Readout()
    """What else is read off its prompt."""
    embedding: np.ndarray | None = None  # float32 [E]: what has been pooled so far
    num_cached_tokens: int = 0
    beams: "BeamSearch | None" = None
    """Of a request with beam search: sequence i is row i's beam, and `beams` knows which tokens that is."""

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def findable(self) -> int | None:
        """How many of its first tokens need not be computed if the prefix cache has them; None: all."""
        if self.bypasses_cache:
            return 0
        return None if self.params.prompt_logprobs is None else self.readout.scored_from

    @property
    def reads_prompt(self) -> bool:
        """Whether something is still read off its prompt's hidden states, which the prefill lane alone gives."""
        return self.wants_prompt_logprobs or self.readout.pooling is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities were asked for and are not complete."""
        if self.params.prompt_logprobs is None:
            return False
        return self.prompt_logprobs is None or len(self.prompt_logprobs) < len(self.prompt_token_ids)
