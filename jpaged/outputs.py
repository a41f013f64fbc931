"""What the engine gives back. Names and fields are vLLM's."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np


class Logprob(NamedTuple):
    """One token's log-probability under the model's raw distribution."""

    logprob: float
    rank: int | None
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None


def changed[T](output: T, **fields: Any) -> T:
    """A copy with other values in some fields: `dataclasses.replace` without its checks, which were half of the work
    that a streamed token makes in the event loop."""
    copy = object.__new__(type(output))
    copy.__dict__ |= output.__dict__
    copy.__dict__ |= fields
    return copy


LogprobsAt = dict[int, Logprob]
"""One position: token id -> Logprob, for the chosen token and the most likely ones."""


@dataclasses.dataclass(kw_only=True)
class CompletionOutput:
    """One generated sequence of a request."""

    index: int
    """Which of the n samples."""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the chosen tokens' log-probabilities; None unless logprobs were asked for."""
    logprobs: list[LogprobsAt] | None
    finish_reason: str | None = None
    """None while running; then one of stop, length, abort, error."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for the end-of-sequence token and the rest."""
    weights_version: int | None = None
    """How often the weights had been updated when it ended; None while running."""
    score: float | None = None
    """Of a beam search: cumulative_logprob / length ** length_penalty, by which the outputs are ranked."""

    def finished(self) -> bool:
        return self.finish_reason is not None

    def after(self, num_tokens: int, num_chars: int) -> "CompletionOutput":
        """What follows the first tokens and characters: a delta, for who has those."""
        if not num_tokens and not num_chars:
            return self
        logprobs = None if self.logprobs is None else self.logprobs[num_tokens:]
        return changed(self, text=self.text[num_chars:], token_ids=self.token_ids[num_tokens:], logprobs=logprobs)


@dataclasses.dataclass(kw_only=True)
class RequestMetrics:
    """Seconds on `time.monotonic`'s clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclasses.dataclass(kw_only=True)
class RequestOutput:
    """A request's state at one moment."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int
    """Prompt tokens whose K and V came from the prefix cache."""
    embedding: np.ndarray | None = None  # float32 [E]
    """The prompt's pooled final hidden state, not normalised, if it was asked for; see `LLM.embed`."""

    @property
    def weights_version(self) -> int | None:
        """Under which weights the last of its outputs ended; see `LLM.update_weights`. None while any is running."""
        versions = [output.weights_version for output in self.outputs]
        return None if None in versions else max(versions, default=None)  # type: ignore[type-var]  # none is None
