"""Beam search and the batch: which rows a group's beams have, and what becomes of them between two steps.

`BeamSearch` decides in ranks; here ranks are sequences with rows and blocks. `group.sequences` is in rank order.
A beam's tokens live in the search's tree; a `Sequence` gets them when it loses its row, or when the search ends.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jpaged.memory import BlockManager
from jpaged.scheduling.beam_search import BeamSearch, Companion, Hypothesis, path
from jpaged.scheduling.plan import Edits, StepPlan
from jpaged.sequence import Sequence, SequenceGroup


class Candidates(NamedTuple):
    """The best continuations of each of the plan's beam groups, best first."""

    scores: np.ndarray  # float32 [G, K]: cumulative log-probabilities
    parents: np.ndarray  # int32 [G, K]: ranks
    tokens: np.ndarray  # int32 [G, K]


class ChosenLogprob(NamedTuple):
    """What a beam's node remembers for its log-probabilities."""

    result: np.ndarray  # int32 [columns]: the parent's row of results
    token: int
    logprob: float


def new_search(group: SequenceGroup, companion: Companion | None = None) -> BeamSearch:
    """The search that a group's parameters ask for; `companion` is its bare prompt's."""
    params, first = group.params, group.sequences[0]
    return BeamSearch(
        width=len(group.sequences),
        num_return=params.n,
        prompt_length=len(group.prompt_token_ids),
        max_length=first.max_length,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_ids=first.stop_token_ids,
        companion=companion,
    )


def search_of(group: SequenceGroup) -> BeamSearch:
    return group.beams  # type: ignore[return-value]  # of a group that searches


def advance(
    group: SequenceGroup, members: list[int], results: np.ndarray, offered: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> list[tuple[int, int]]:
    """Lets a group's search take a step; returns (parent's rank, token) of each new beam.

    Args:
      members: of each rank, its row of results.
      results: int32 [N, columns].
      offered: (scores float32 [K], parents int32 [K], tokens int32 [K]).
    """
    search = search_of(group)
    scores, parents, tokens = (x[: search.num_candidates] for x in offered)
    logprobs = None
    if group.params.logprobs is not None:
        gains = scores - search.scores[parents]
        logprobs = [
            ChosenLogprob(results[members[parent]], token, gain)
            for parent, token, gain in zip(parents.tolist(), tokens.tolist(), gains.tolist(), strict=True)
        ]
    return search.advance(scores, parents, tokens, logprobs)


def offers(plan: StepPlan, candidates: Candidates) -> Iterator[tuple[SequenceGroup, list[int], tuple]]:
    """(group, members, its candidates) of every beam group that a step has advanced and that still runs."""
    for i, (group, members) in enumerate(plan.beams):
        if not group.finished:
            yield group, members, (candidates.scores[i], candidates.parents[i], candidates.tokens[i])


def reorder(
    group: SequenceGroup, choices: list[tuple[int, int]], blocks: BlockManager, position: np.ndarray, edits: Edits
) -> None:
    """Lets each new beam be a fork of its parent: a first child keeps the parent's row, others take rows of the dead.

    Args:
      position: int32 [rows]: of each row, where the new token goes.
      edits: gets what the device has to be told.
    """
    old = group.sequences
    fertile = {parent for parent, _ in choices}
    dead = iter([s for rank, s in enumerate(old) if rank not in fertile])
    sequences: list[Sequence] = []
    for parent, token in choices:
        source = sequence = old[parent]
        if parent in fertile:
            fertile.remove(parent)
        else:
            sequence = next(dead)
            blocks.close(sequence.row)
            blocks.fork(source.row, sequence.row)
            edits.forks.append((source.row, sequence.row))
        edits.tokens.append((sequence.row, int(position[source.row]), token))
        sequences.append(sequence)
    group.sequences = sequences


def write_back(group: SequenceGroup) -> None:
    """Gives the sequences of a search that goes on their tokens: their rows are about to be lost."""
    for sequence, node in zip(group.sequences, search_of(group).nodes, strict=True):
        if node is not None:
            sequence.tokens = group.prompt_token_ids + [n.token for n in path(node)]


def write_best(group: SequenceGroup) -> None:
    """Makes the best hypotheses the group's sequences: the search has ended, or is given up."""
    best = search_of(group).best()
    del group.sequences[max(len(best), 1) :]
    for index, (sequence, hypothesis) in enumerate(zip(group.sequences, best, strict=False)):
        _write(sequence, index, hypothesis)


def _write(sequence: Sequence, index: int, hypothesis: Hypothesis) -> None:
    group = sequence.group
    sequence.index = index
    sequence.tokens = group.prompt_token_ids + hypothesis.token_ids
    sequence.cumulative_logprob, sequence.score = hypothesis.cumulative_logprob, hypothesis.score
    sequence.finish_reason = hypothesis.finish_reason
    by_token = hypothesis.node.token in group.params.stop_token_ids
    sequence.stop_reason = hypothesis.node.token if by_token else hypothesis.stop
    if group.params.logprobs is not None:
        sequence.chosen = hypothesis.logprobs
