"""Ledger: which requests have been accepted and how they ended, as plain data that outlives the process.

It is made again from a snapshot of it and the journal's lines since. A line tells one of

    accepted     a request, and how the engine began it
    result       one of its prompts has been continued to the end
    forgotten    nobody will ask for it any more
    died         the engine failed; who was unfinished may have been the reason
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_json

from jpaged.errors import SnapshotError
from jpaged.server.tickets import Ticket
from jpaged.snapshots import RequestRecord, ResultRecord, Snapshot
from jpaged.snapshots.journal import Line
from jpaged.snapshots.records import FORMAT


@dataclasses.dataclass(kw_only=True)
class Entry:
    """A request of a client: one or more of the engine's."""

    ticket: Ticket
    body: dict[str, Any]
    """What the client sent."""
    parts: list[str]
    """Names of the engine's requests, one for each prompt."""
    kept: bool
    """It goes on without a reader, and its result is kept."""
    deaths: int = 0
    """How often the engine has failed while it was unfinished."""
    finished_at: float | None = None
    """In seconds since the epoch."""


@dataclasses.dataclass(kw_only=True)
class State:
    """Everything at one moment."""

    entries: list[Entry]
    results: list[ResultRecord]
    engine: Snapshot


_STATE, _ENTRY = TypeAdapter(State), TypeAdapter(Entry)
_RESULT, _SNAPSHOT = TypeAdapter(ResultRecord), TypeAdapter(Snapshot)


def encode(state: State) -> bytes:
    return to_json(state, inf_nan_mode="constants")


def decode(data: bytes, lines: Iterable[Line]) -> State:
    """The state after all that the lines tell. To tell what a state knows already changes nothing.

    Raises:
      SnapshotError: they are of another version, or no such things.
    """
    try:
        state = _STATE.validate_json(data)
        if state.engine.format != FORMAT:
            raise SnapshotError(f"the snapshot has format {state.engine.format}, and this version reads {FORMAT}.")
        book = _Book(state)
        for line in lines:
            book.take(line)
    except ValueError as error:  # pydantic's are
        raise SnapshotError(f"the snapshot can't be read: {str(error).splitlines()[0]}") from error
    return book.state()


class _Book:
    def __init__(self, state: State) -> None:
        self._engine = state.engine
        self._next_arrival = state.engine.next_arrival
        self._entries = {entry.ticket.id: entry for entry in state.entries}
        self._requests: dict[str, RequestRecord] = {record.request_id: record for record in state.engine.requests}
        self._results = {result.request_id: result for result in state.results}

    def take(self, line: Line) -> None:
        if "accepted" in line:
            entry, begun = _ENTRY.validate_python(line["accepted"]), _SNAPSHOT.validate_python(line["begun"])
            self._next_arrival = max(self._next_arrival, begun.next_arrival)
            if entry.ticket.id not in self._entries:
                self._entries[entry.ticket.id] = entry
                self._requests |= {record.request_id: record for record in begun.requests}
        elif "result" in line:
            result = _RESULT.validate_python(line["result"])
            self._results[result.request_id] = result
        elif "forgotten" in line:
            if line["forgotten"] in self._entries:
                for part in self._entries.pop(line["forgotten"]).parts:
                    self._requests.pop(part, None)
                    self._results.pop(part, None)
        elif "died" in line:
            for entry in self._entries.values():
                entry.deaths += any(part not in self._results for part in entry.parts)

    def state(self) -> State:
        """Without what belongs to no entry."""
        entries = list(self._entries.values())
        parts = [part for entry in entries for part in entry.parts]
        results = [self._results[part] for part in parts if part in self._results]
        left = [part for part in parts if part not in self._results]
        if missing := [part for part in left if part not in self._requests]:
            raise SnapshotError(f"the snapshot lacks the requests {missing}.")
        requests = sorted((self._requests[part] for part in left), key=lambda record: record.order)
        engine = dataclasses.replace(self._engine, requests=requests, next_arrival=self._next_arrival)
        return State(entries=entries, results=results, engine=engine)
