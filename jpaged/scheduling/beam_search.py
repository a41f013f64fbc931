"""Beam search on the host: which of the device's candidates go on, which have ended, and when to stop.

The device adds each running beam's score to the log-probabilities of its next token and hands over the best K
continuations of the whole group. All that is left to do takes a few comparisons and no copy of any sequence,
because hypotheses are paths in a tree of parent pointers:

    "The" <- "cat" <- "sat"        rank 0
                   <- "is"         rank 1
                   <- eos          finished

Equal to Hugging Face's `GenerationMixin._beam_search` (transformers 5) for one prompt, scores in float32 included.
There, -1e9 stands for minus infinity. Only where real scores fall below it (sum * length ** -length_penalty, for a
strongly negative penalty) do the two differ: Hugging Face then stops early and returns unfinished fragments.
The paper: arXiv 2309.06180, section 4.4.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jpaged.sequence import FinishReason

UNBORN = -1e9
"""Score of the ranks that do not exist: all beams start from one prompt, and it must not be continued twice. Later too,
where fewer continuations are allowed, or go on, than there are ranks."""


class Companion(Protocol):
    """What goes along with a running beam, besides its tokens."""

    @property
    def stop(self) -> str | None:
        """The stop string that its last token completed."""

    def follow(self, token: int) -> "Companion":
        """The companion of this beam and one more token."""


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Node:
    """A generated token and what came before it. Hypotheses share their common beginnings."""

    parent: "Node | None"
    token: int
    logprobs: Any = None
    """What the caller wants remembered for this position."""


def path(node: Node | None) -> list[Node]:
    """The nodes of a hypothesis from its first generated token to `node`; [] for None, the bare prompt."""
    nodes = []
    while node is not None:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """A continuation of the prompt, as `BeamSearch.best` ranks it."""

    node: Node
    """Its last token."""
    score: float
    """cumulative_logprob / number of generated tokens ** length_penalty."""
    cumulative_logprob: float
    finish_reason: FinishReason | None
    """STOP: its last token is an end-of-sequence token, or completes a stop string; LENGTH: it is as long as allowed;
    None: it still runs."""
    stop: str | None = None
    """The stop string that its last token completed."""

    @property
    def token_ids(self) -> list[int]:
        return [node.token for node in path(self.node)]

    @property
    def logprobs(self) -> list[Any]:
        return [node.logprobs for node in path(self.node)]


class BeamSearch:
    """The beams of one group. `advance` once per step until `done`, then `best`.

    Args:
      width: number of running beams; at most as many finished hypotheses are kept.
      num_return: number of hypotheses that `best` returns; at most `width`.
      prompt_length, max_length: tokens; the second counts prompt and output, and is larger.
      length_penalty: exponent of the length that divides a finished score. Above 0 favours long hypotheses.
      early_stopping: what ends the search once `width` hypotheses have finished. True: that alone. False: that the
        best running beam would not be kept if it ended now. "never": that it would not even if it reached
        `max_length` at no further cost (the same as False unless length_penalty > 0).
      eos_token_ids: tokens that end a hypothesis; each stays its last token.
      companion: of the bare prompt, if beams have one; a token that completes a stop string ends a hypothesis, too.

    Attributes:
      scores: float32 [width], cumulative log-probabilities of the running beams, best first. [0] after the end.
      nodes: their last tokens, None before the first; also emptied at the end.
      companions: theirs.
      finished: at most `width` hypotheses, best first; of equal ones, the earlier.
      num_generated: length of the running beams without the prompt.
      num_candidates: K. Each beam has as many ways to end as there are end-of-sequence tokens, so that many
        candidates leave at least `width` that go on.
      done: no step can change the result any more.
    """

    def __init__(
        self,
        width: int,
        num_return: int,
        prompt_length: int,
        max_length: int,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        eos_token_ids: frozenset[int],
        companion: Companion | None = None,
    ) -> None:
        self.width = width
        self.num_return = num_return
        self.max_generated = max_length - prompt_length
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.eos_token_ids = eos_token_ids
        self.num_candidates = width * max(2, 1 + len(eos_token_ids))
        self.scores = np.full(width, UNBORN, np.float32)
        self.scores[0] = 0
        self.nodes: list[Node | None] = [None] * width
        self.companions: list[Companion | None] = [companion] * width
        self.finished: list[Hypothesis] = []
        self.num_generated = 0
        self.done = False

    def advance(
        self, scores: np.ndarray, parents: np.ndarray, tokens: np.ndarray, logprobs: Sequence[Any] | None = None
    ) -> list[tuple[int, int]]:
        """Takes the best continuations of the running beams, best first.

        Args:
          scores: float32 [num_candidates], cumulative log-probabilities, the new token's included.
          parents: int [num_candidates], the rank that is continued.
          tokens: int [num_candidates].
          logprobs: entries for the nodes.

        Returns:
          (parent's rank, token) of the new running beams in rank order; [] if none are left.
        """
        self.num_generated += 1
        at_limit = self.num_generated == self.max_generated
        choices = list(zip(parents.tolist(), tokens.tolist(), strict=True))
        entries = logprobs or [None] * len(choices)
        running: list[tuple[int, Node, Companion | None]] = []
        for i, ((parent, token), entry) in enumerate(zip(choices, entries, strict=True)):
            if scores[i] <= UNBORN / 2 or (i >= self.width and len(running) == self.width):
                break  # of a rank that does not exist, or not allowed; or there are enough
            node, companion = Node(self.nodes[parent], token, entry), self.companions[parent]
            ends = token in self.eos_token_ids
            companion = None if ends or companion is None else companion.follow(token)
            stop = None if companion is None else companion.stop
            if not (ends or stop or at_limit):
                running.append((i, node, companion))
            # The lower candidates only replace beams that ended: they go on, but do not finish.
            elif i < self.width:
                self._finish(node, scores[i], FinishReason.STOP if ends or stop else FinishReason.LENGTH, stop)
        born = len(running)
        running += running[:1] * (self.width - born)  # ranks that do not exist go along with the first
        kept = [i for i, _, _ in running]
        self.scores = scores[kept]
        self.scores[born:] = UNBORN
        self.nodes, self.companions = [node for _, node, _ in running], [companion for _, _, companion in running]
        self.done = not running or not self._can_improve()
        return [choices[i] for i in kept]

    def best(self) -> list[Hypothesis]:
        """The `num_return` best hypotheses, best first.

        Before `done` the running beams follow the finished ones; before the first step there are none.
        """
        running = (
            Hypothesis(node, self._penalised(score, self.num_generated), float(score), None)
            for node, score in zip(self.nodes, self.scores, strict=True)
            if node is not None and score > UNBORN / 2
        )
        return [*self.finished, *running][: self.num_return]

    def _finish(self, node: Node, score: np.float32, reason: FinishReason, stop: str | None) -> None:
        final = self._penalised(score, self.num_generated)
        self.finished.append(Hypothesis(node, final, float(score), reason, stop))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]

    def _can_improve(self) -> bool:
        if len(self.finished) < self.width:
            return True
        if self.early_stopping is True:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_generated if longest else self.num_generated
        return self._penalised(self.scores[0], length) > self.finished[-1].score

    def _penalised(self, score: np.float32, length: int) -> float:
        return float(score / np.float32(length**self.length_penalty))
