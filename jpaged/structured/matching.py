"""Matcher: how far one sequence is in its grammar, and which tokens may follow; and the masks of a step."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from jpaged.scheduling import StepPlan
    from jpaged.sequence import Sequence


class Matcher:
    """A place in a grammar. It is derived from the output's tokens alone, so a preemption changes nothing.

    Where the grammar is at an end, only the model's end-of-sequence tokens may follow.
    """

    __slots__ = ("_matcher", "_num_consumed")

    def __init__(self, matcher: "LLMatcher", num_consumed: int = 0) -> None:
        self._matcher = matcher
        self._num_consumed = num_consumed

    def fork(self) -> "Matcher":
        """Another matcher at the same place; takes microseconds."""
        return Matcher(self._matcher.deep_copy(), self._num_consumed)

    def advance(self, tokens: list[int]) -> None:
        """Consumes what is new in an output's tokens."""
        for token in tokens[self._num_consumed :]:
            self._matcher.consume_token(token)
        self._num_consumed = len(tokens)

    def follow(self, token: int) -> "Matcher":
        """Another matcher, one token further."""
        twin = self.fork()
        twin._matcher.consume_token(token)
        twin._num_consumed += 1
        return twin

    def allowed(self) -> np.ndarray:
        """The tokens that may follow, uint32 [at least ceil(V / 32)]: a bit a token. See `error` afterwards."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)

    @property
    def error(self) -> str | None:
        """Why nothing may follow: a bound on the work of a step was reached. It stays so."""
        return self._matcher.get_error().partition("\n")[0] or None


class Masks(NamedTuple):
    """What the sampler needs to know about a step."""

    allowed: np.ndarray  # uint32 [N, ceil(V / 32)]: of each of the plan's results, a bit a token
    failed: "list[tuple[Sequence, str]]"  # sequences that can't go on, and why


def masks_of(plan: "StepPlan", vocab_size: int) -> Masks:
    """The masks of a plan's results; all tokens for sequences without a grammar.

    The tokens of the steps before it must have been read.
    """
    allowed = np.full((plan.bucket.num_results, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    failed: list[tuple[Sequence, str]] = []

    def restrict(mask: np.ndarray, sequences: "list[Sequence]", matcher: Matcher) -> None:
        tokens = matcher.allowed()
        if (error := matcher.error) is not None:
            failed.extend((sequence, error) for sequence in sequences)
        else:
            mask[:] = tokens[: len(mask)]

    for mask, sequence in zip(allowed, plan.sampling, strict=False):  # results are padded
        if sequence.matcher is not None and not sequence.finished:
            sequence.matcher.advance(sequence.output_token_ids)
            restrict(mask, [sequence], sequence.matcher)
    for group, members in plan.beams:
        if group.params.structured_outputs is None or group.finished:
            continue
        for member, companion in zip(members, group.beams.companions, strict=True):  # type: ignore[union-attr]
            restrict(allowed[member], group.sequences, companion.matcher)
    return Masks(allowed, failed)
