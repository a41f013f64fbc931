"""The ledger: a state, and lines told once, twice, in any order that a journal may have."""

import dataclasses
import itertools

import pytest

from jpaged import SamplingParams
from jpaged.errors import SnapshotError
from jpaged.outputs import CompletionOutput, Logprob, RequestMetrics
from jpaged.sequence import Readout
from jpaged.server.ledger import Entry, State, decode, encode
from jpaged.server.tickets import Ticket
from jpaged.snapshots import RequestRecord, ResultRecord, SequenceRecord, Snapshot
from jpaged.snapshots.journal import read
from jpaged.snapshots.store import Store

EMPTY = State(entries=[], results=[], engine=Snapshot(fingerprint="f", next_arrival=0, requests=[]))


def request(name, arrival):
    return RequestRecord(
        request_id=name,
        prompt=None,
        prompt_token_ids=[3, 4],
        params=SamplingParams(n=2, logit_bias={7: 1.5}, stop=["x"]),
        seed=(1 << 64) - 1,
        order=(0, arrival),
        max_length=18,
        cache_salt="",
        bypasses_cache=False,
        readout=Readout(),
        metrics=RequestMetrics(arrival_time=1.5),
        num_cached_tokens=0,
        prompt_logprobs=None,
        sequences=[SequenceRecord(token_ids=[], logprobs=[], cumulative_logprob=0.0)] * 2,
    )


def entry(name, parts):
    ticket = Ticket(id=name, kind="cmpl", model="m", created=1, named=True)
    return Entry(ticket=ticket, body={"prompt": "é"}, parts=parts, kept=True)


def accepted(name, parts, arrival):
    begun = {
        "fingerprint": "f",
        "next_arrival": arrival + len(parts),
        "requests": [request(part, arrival + i) for i, part in enumerate(parts)],
    }
    return {"accepted": entry(name, parts), "begun": begun}


def result(name):
    completion = CompletionOutput(
        index=0, text="é\n", token_ids=[5], cumulative_logprob=-1.0, logprobs=[{5: Logprob(-float("inf"), None, "é")}]
    )
    record = ResultRecord(
        request_id=name,
        prompt="p",
        prompt_token_ids=[3, 4],
        prompt_logprobs=[None, {4: Logprob(-0.1, 1, None)}],
        outputs=[completion],
        metrics=RequestMetrics(arrival_time=1.0),
        num_cached_tokens=1,
    )
    return {"result": record}


@pytest.fixture
def journal(tmp_path):
    """Lines as they come back from a file."""

    def of(*lines):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        store = Store(folder)
        number = store.begin()
        for line in lines:
            store.append(line)
        store.close()
        return list(read(folder / f"journal-{number}.jsonl"))

    return of


LINES = [
    accepted("a", ["a"], 0),
    accepted("b", ["b-0", "b-1"], 1),
    result("b-1"),
    accepted("c", ["c"], 3),
    {"forgotten": "a"},
    result("c"),
]


def test_what_is_left_to_do(journal):
    state = decode(encode(EMPTY), journal(*LINES))
    assert [e.ticket.id for e in state.entries] == ["b", "c"]
    assert [r.request_id for r in state.engine.requests] == ["b-0"]
    assert [r.request_id for r in state.results] == ["b-1", "c"]
    assert state.engine.next_arrival == 4
    assert state.engine.requests[0] == request("b-0", 1)
    assert state.results[0] == result("b-1")["result"]
    assert state.entries[0] == entry("b", ["b-0", "b-1"])


def test_telling_what_a_state_knows_changes_nothing(journal):
    lines = journal(*LINES)
    whole = decode(encode(EMPTY), lines)
    for cut in range(len(lines) + 1):
        before = decode(encode(EMPTY), lines[:cut])
        assert decode(encode(before), lines[cut:]) == whole
        assert decode(encode(before), lines) == whole, "a snapshot is taken after its journal has begun"


def test_a_result_may_come_before_its_acceptance(journal):
    for lines in itertools.permutations([accepted("c", ["c"], 3), result("c")]):
        state = decode(encode(EMPTY), journal(*lines))
        assert (len(state.results), len(state.engine.requests)) == (1, 0)


def test_a_name_may_be_used_again(journal):
    lines = [accepted("a", ["a"], 0), result("a"), {"forgotten": "a"}, accepted("a", ["a"], 1)]
    state = decode(encode(EMPTY), journal(*lines))
    assert [r.order for r in state.engine.requests] == [(0, 1)]
    assert state.results == []


def test_deaths_are_counted_for_who_was_unfinished(journal):
    state = decode(encode(EMPTY), journal(*LINES, {"died": True}, {"died": True}))
    assert {e.ticket.id: e.deaths for e in state.entries} == {"b": 2, "c": 0}


def test_another_format_or_damage_is_told(journal):
    newer = dataclasses.replace(EMPTY, engine=dataclasses.replace(EMPTY.engine, format=99))
    with pytest.raises(SnapshotError, match="format 99"):
        decode(encode(newer), [])
    with pytest.raises(SnapshotError, match="can't be read"):
        decode(b'{"entries": 7}', [])
    with pytest.raises(SnapshotError, match="lacks"):
        decode(encode(dataclasses.replace(EMPTY, entries=[entry("a", ["a"])])), [])
