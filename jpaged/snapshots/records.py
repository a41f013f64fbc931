"""Records: unfinished requests as plain data, and back.

What is kept is what cannot be computed again: prompts, parameters, seeds, places in the queue; and the tokens so far,
which could be, but need not. Keys, values, grammars and texts follow from these. A sample's random key is made of its
request's seed, its sequence and its position (DESIGN, contract 8), so the tokens that follow are the same, wherever
and whenever they are drawn.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jpaged.outputs import CompletionOutput, LogprobsAt, RequestMetrics, RequestOutput
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling.beam_search import BeamSearch, Hypothesis, Node, path
from jpaged.scheduling.beams import ChosenLogprob, write_back
from jpaged.sequence import FinishReason, Readout, Sequence, SequenceGroup

FORMAT = 2
AS_THEY_ARE = (
    *("request_id", "prompt", "prompt_token_ids", "params", "seed", "order"),
    *("cache_salt", "bypasses_cache", "readout", "num_cached_tokens"),
)
"""Fields of a `SequenceGroup` that its record has as they are."""
NONE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceRecord:
    """A sequence of a request."""

    token_ids: list[int]
    """Of its output; of a running beam none, because the search has them."""
    logprobs: list[LogprobsAt]
    cumulative_logprob: float
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    weights_version: int | None = None
    stopped_text: str | None = None
    """Its whole text, where a stop string ended it."""


class NodeRecord(NamedTuple):
    """A node of a beam search's tree."""

    parent: int
    """Which node; NONE: the prompt."""
    token: int
    result: int
    """Which row of `BeamsRecord.results`; NONE: no log-probabilities are wanted."""
    logprob: float


class HypothesisRecord(NamedTuple):
    node: int
    score: float
    cumulative_logprob: float
    finish_reason: FinishReason | None
    stop: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamsRecord:
    """A beam search that goes on."""

    num_generated: int
    scores: list[float]
    """float32, in rank order."""
    ranks: list[int]
    """Of each rank, its last node; NONE: the bare prompt."""
    finished: list[HypothesisRecord]
    nodes: list[NodeRecord]
    """Parents before children."""
    results: list[list[int]]
    """int32: what log-probabilities are made from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """An unfinished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    order: tuple[int, int]
    """(priority, arrival)."""
    max_length: int
    cache_salt: str
    bypasses_cache: bool
    readout: Readout
    """What has been pooled so far is not kept: the prompt is computed again."""
    metrics: RequestMetrics
    """In seconds since the epoch."""
    num_cached_tokens: int
    prompt_logprobs: list[LogprobsAt | None] | None
    sequences: list[SequenceRecord]
    beams: BeamsRecord | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An engine's unfinished requests at one moment."""

    fingerprint: str
    """Of the model: `jpaged.snapshots.fingerprint`."""
    next_arrival: int
    requests: list[RequestRecord]
    format: int = FORMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """A finished request; fields as in `RequestOutput`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    """In seconds since the epoch."""
    num_cached_tokens: int


# ------------------------------------------------------------------------------------------------------- to records


def record_of(group: SequenceGroup, stopped_text: Callable[[Sequence], str | None]) -> RequestRecord:
    """A group in whatever state it is.

    Args:
      stopped_text: of a sequence that a stop string has ended.
    """
    prompt = group.prompt_token_ids
    return RequestRecord(
        **{name: getattr(group, name) for name in AS_THEY_ARE},
        max_length=group.sequences[0].max_length,
        metrics=_on_clock(group.metrics, time.time() - time.monotonic()),
        prompt_logprobs=None if group.prompt_logprobs is None else list(group.prompt_logprobs),
        sequences=[
            SequenceRecord(
                token_ids=sequence.tokens[len(prompt) :] if group.beams is None else [],
                logprobs=list(sequence.logprobs),
                cumulative_logprob=sequence.cumulative_logprob,
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                weights_version=sequence.weights_version,
                stopped_text=stopped_text(sequence),
            )
            for sequence in group.sequences
        ],
        beams=None if group.beams is None else _beams_record(group.beams),
    )


def record_of_result(output: RequestOutput) -> ResultRecord:
    """Embeddings are not kept."""
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(ResultRecord)}
    return ResultRecord(**{**fields, "metrics": _on_clock(output.metrics, time.time() - time.monotonic())})


def result_of(record: ResultRecord) -> RequestOutput:
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    metrics = _on_clock(record.metrics, time.monotonic() - time.time())
    return RequestOutput(**{**fields, "metrics": metrics}, finished=True)


def _on_clock(metrics: RequestMetrics, offset: float) -> RequestMetrics:
    """The same moments on a clock that is `offset` seconds ahead."""
    moments = {
        name: None if (moment := getattr(metrics, name)) is None else moment + offset
        for name in ("arrival_time", "first_scheduled_time", "first_token_time", "finished_time")
    }
    return dataclasses.replace(metrics, **moments)  # type: ignore[arg-type]  # names and values fit


def _beams_record(search: BeamSearch) -> BeamsRecord:
    numbers: dict[int, int] = {}  # id of a node -> its place in `nodes`
    nodes: list[NodeRecord] = []
    rows: dict[int, int] = {}  # id of an array of results -> its place in `results`
    results: list[list[int]] = []

    def number(node: Node | None) -> int:
        new = []
        while node is not None and id(node) not in numbers:
            new.append(node)
            node = node.parent
        last = NONE if node is None else numbers[id(node)]
        for one in reversed(new):
            chosen, row = one.logprobs, NONE
            if chosen is not None:
                row = rows.setdefault(id(chosen.result), len(results))
                if row == len(results):
                    results.append(chosen.result.tolist())
            nodes.append(NodeRecord(last, one.token, row, 0.0 if chosen is None else chosen.logprob))
            last = numbers[id(one)] = len(nodes) - 1
        return last

    return BeamsRecord(
        num_generated=search.num_generated,
        scores=search.scores.tolist(),
        ranks=[number(node) for node in search.nodes],
        finished=[
            HypothesisRecord(number(h.node), h.score, h.cumulative_logprob, h.finish_reason, h.stop)
            for h in search.finished
        ],
        nodes=nodes,
        results=results,
    )


# ----------------------------------------------------------------------------------------------------- from records


def refill(group: SequenceGroup, record: RequestRecord) -> None:
    """Gives a group that was made anew what its record has: tokens, log-probabilities, beams."""
    group.prompt_logprobs = record.prompt_logprobs
    group.metrics = _on_clock(record.metrics, time.monotonic() - time.time())
    for sequence, kept in zip(group.sequences, record.sequences, strict=True):
        sequence.tokens += kept.token_ids
        sequence.logprobs = kept.logprobs
        sequence.cumulative_logprob = kept.cumulative_logprob
        sequence.finish_reason, sequence.stop_reason = kept.finish_reason, kept.stop_reason
        sequence.weights_version = kept.weights_version
    if record.beams is not None and group.beams is not None:
        _refill_beams(group.beams, record.beams)
        write_back(group)


def _refill_beams(search: BeamSearch, record: BeamsRecord) -> None:
    results = [np.array(row, np.int32) for row in record.results]
    nodes: list[Node] = []
    for parent, token, row, logprob in record.nodes:
        chosen: Any = None if row == NONE else ChosenLogprob(results[row], token, logprob)
        nodes.append(Node(None if parent == NONE else nodes[parent], token, chosen))
    search.num_generated = record.num_generated
    search.scores = np.array(record.scores, np.float32)
    search.nodes = [None if rank == NONE else nodes[rank] for rank in record.ranks]
    for rank, node in enumerate(search.nodes):
        companion = search.companions[rank]  # the bare prompt's
        for step in path(node):
            companion = None if companion is None else companion.follow(step.token)
        search.companions[rank] = companion
    search.finished = [
        Hypothesis(nodes[h.node], h.score, h.cumulative_logprob, h.finish_reason, h.stop) for h in record.finished
    ]
