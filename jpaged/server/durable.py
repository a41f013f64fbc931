"""Durable: requests that outlive their connections, and the server.

    accept ---> journal, fsynced ---> the client gets its first byte
    outputs of the engine ---> results ---> journal
    now and then, and at the end: a snapshot of the engine and of the ledger; the journal begins anew

A request is on the disk before its client hears that it was accepted. Tokens are in snapshots alone: after a crash
those that came later are computed again, and are the same (DESIGN, contract 8).
"""

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpaged.async_engine import AsyncLLM
from jpaged.engine import LLMEngine
from jpaged.errors import SnapshotError
from jpaged.outputs import RequestOutput
from jpaged.sampling_params import RequestOutputKind
from jpaged.server.config import ServerConfig
from jpaged.server.errors import ApiError
from jpaged.server.ledger import Entry, State, decode, encode
from jpaged.server.tickets import Ticket
from jpaged.snapshots import record_of_result, result_of
from jpaged.snapshots.pool import Tree, adopt_cache, read_cache
from jpaged.snapshots.store import Store
from jpaged.streams import Stream

log = logging.getLogger("jpaged.server")

MAX_JOURNAL_BYTES = 64 << 20
"""A longer journal makes a snapshot due."""
MAX_RESULT_BYTES = 256 << 20
"""Of finished requests that are kept, about; the oldest go first."""
MAX_DEATHS = 2
"""A request that was unfinished when the engine failed more often is not tried again."""
_TICK = 1.0
_BYTES_A_TOKEN = 16
_BYTES_A_LOGPROB = 48


def suspended() -> ApiError:
    return ApiError(
        503,
        "the server stops, and the request goes on when it is back: GET /v1/requests/ID, with the id of its answer.",
        code="suspended",
    )


def _taken(ticket: Ticket) -> ApiError:
    return ApiError(
        409,
        f"another request is named {ticket.id!r}: choose another X-Request-Id or request_id, or DELETE /v1/requests/ID "
        "first.",
        param="request_id",
        code="request_exists",
    )


class Durable:
    """The accepted requests of a server.

    Args:
      llm: the engine; nothing may have been submitted yet.
      config: with a snapshot_dir.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self._llm, self._config = llm, config
        self._store: Store | None = None
        self._lock = threading.Lock()  # of the next four: handlers and the engine's thread change them
        self._entries: dict[str, Entry] = {}
        self._owners: dict[str, Entry] = {}  # of the engine's requests
        self._results: dict[str, RequestOutput] = {}
        self._journaled: set[str] = set()  # entries whose acceptance is in the journal
        self._saving = asyncio.Lock()
        self._saved_at = 0.0
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False  # nothing is accepted any more
        self._taken = False  # nor is any result: the last snapshot has been taken, or the engine is dead
        llm.on_outputs.append(self._take)

    @property
    def is_open(self) -> bool:
        return self._store is not None and not self._closed

    # ------------------------------------------------------------------------------------------ beginning and end

    async def start(self) -> None:
        """Goes on with what is in the folder.

        Raises:
          SnapshotError: it is in use, damaged, or belongs to another model.
        """
        store = await asyncio.to_thread(Store, Path(self._config.snapshot_dir or ""))
        try:
            found = await asyncio.to_thread(_load, store)
            number, self._store = store.begin(), store  # from now on a death is told
            if found is not None:
                await self._go_on(*found)
            await self._write(number)
        except BaseException:
            self._store = None
            await asyncio.to_thread(store.close)
            raise
        self._ticking = asyncio.create_task(self._tick())

    async def _go_on(self, state: State, pool: Tree) -> None:
        with self._lock:
            for entry in state.entries:
                entry.kept = True  # its client has lost it, and may come back
                self._entries[entry.ticket.id] = entry
                self._owners |= dict.fromkeys(entry.parts, entry)
                self._journaled.add(entry.ticket.id)
            self._results = {result.request_id: result_of(result) for result in state.results}
            given_up = [part for e in state.entries if e.deaths > MAX_DEATHS for part in e.parts]
        count = await self._llm.call(lambda engine: adopt_cache(pool, engine.blocks, engine.runner))
        if count:
            log.info("%d blocks of the KV cache are those of the snapshot", count)
        await self._llm.restore(state.engine)
        if given_up:
            await self._llm.abort(given_up)
        count = len(state.engine.requests)
        log.info("resumed %d unfinished requests; %d finished ones are kept", count, len(state.results))

    async def suspend(self) -> None:
        """Stops the engine, writes all that there is, and tells the readers. Nothing is accepted any more."""
        async with self._saving:
            if not self.is_open:
                return
            self._closed = True
            store: Store = self._store  # type: ignore[assignment]  # it is open
            number = store.begin()
            state, pool = await self._llm.suspend(self._last_state_and_pool, suspended())
            await asyncio.to_thread(store.save, number, encode(state), pool)
        await self._close()
        log.info("%d unfinished requests are in %s", len(state.engine.requests), self._config.snapshot_dir)

    def died(self) -> None:
        """The engine has failed: what is in the journal is what the next server goes on with. On any thread."""
        if self.is_open:
            self._closed = self._taken = True
            self._store.append({"died": True})  # type: ignore[union-attr]  # it is open

    async def _close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def close(self) -> None:
        """Of a server whose engine has died: waits for the journal."""
        if self._closed and self._store is not None and self._llm.failure is not None:
            await self._close()

    # -------------------------------------------------------------------------------------------------- accepting

    def known(self, ticket: Ticket, body: dict[str, Any]) -> Entry | None:
        """The same request, if it came before: a client may try again under the same name.

        Raises:
          ApiError: 409, another request has the name.
        """
        entry = self._entries.get(ticket.id)
        if entry is None:
            return None
        if not hmac.compare_digest(entry.ticket.owner, ticket.owner) or entry.body != body:
            raise _taken(ticket)
        return entry

    def open(self, ticket: Ticket, body: dict[str, Any], parts: list[str]) -> Entry:
        """A request that is about to be submitted.

        Raises:
          ApiError: 503, the server is going down; 409, a name is in use.
        """
        if not self.is_open:
            raise suspended()
        entry = Entry(ticket=ticket, body=body, parts=parts, kept=ticket.named)
        with self._lock:
            if self._owners.keys() & parts or ticket.id in self._entries:
                raise _taken(ticket)
            self._entries[ticket.id] = entry
            self._owners |= dict.fromkeys(parts, entry)
        return entry

    async def accepted(self, entry: Entry, streams: Sequence[Stream]) -> None:
        """Returns when the request is on the disk.

        Raises:
          ApiError: 503, it can't be written, or the server is going down.
        """
        begun = [stream.begun for stream in streams]
        line = {
            "accepted": entry,
            "begun": {
                "fingerprint": begun[-1].fingerprint,  # type: ignore[union-attr]  # it is kept
                "next_arrival": max(snapshot.next_arrival for snapshot in begun),  # type: ignore[union-attr]
                "requests": [record for snapshot in begun for record in snapshot.requests],  # type: ignore[union-attr]
            },
        }
        if not self.is_open:
            raise suspended()
        with self._lock:
            written = self._store.append(line)  # type: ignore[union-attr]  # it is open
            self._journaled.add(entry.ticket.id)
        try:
            await asyncio.wrap_future(written)
        except SnapshotError as error:
            self.forget(entry)
            raise ApiError(503, "the request can't be written to the disk.", code="journal_failed") from error

    def left(self, parts: Sequence[str]) -> None:
        """The readers of these are gone, by themselves or because they have got everything."""
        entry = self._owners.get(parts[0]) if parts else None
        if entry is not None and not entry.kept:
            self.forget(entry)

    def forget(self, entry: Entry) -> None:
        """Ends a request, if it has not ended, and drops what it had."""
        if not self.is_open:
            return
        with self._lock:
            if self._entries.get(entry.ticket.id) is not entry:
                return
            del self._entries[entry.ticket.id]
            unfinished = []
            for part in entry.parts:
                del self._owners[part]
                if self._results.pop(part, None) is None:
                    unfinished.append(part)
            if entry.ticket.id in self._journaled:
                self._journaled.discard(entry.ticket.id)
                self._store.append({"forgotten": entry.ticket.id})  # type: ignore[union-attr]  # it is open
        if unfinished:
            self._llm.drop(unfinished)

    # --------------------------------------------------------------------------------------------------- reattaching

    def find(self, name: str, owner: str) -> Entry:
        """A request by its id, or by the name that the client gave it.

        Raises:
          ApiError: 404, there is none, or it is somebody else's.
        """
        for candidate in (name, f"chatcmpl-{name}", f"cmpl-{name}"):
            entry = self._entries.get(candidate)
            if entry is not None and hmac.compare_digest(entry.ticket.owner, owner):
                return entry
        raise ApiError(404, f"there is no request {name!r}, or it is kept no longer.", code="request_not_found")

    async def attach(self, entry: Entry, kind: RequestOutputKind) -> list[Stream]:
        """Readers of a request, from its first token on; it is kept from now on."""
        entry.kept = True
        streams: list[Stream] = []
        for part in entry.parts:
            stream = await self._llm.attach(part, kind)  # None: it has ended, and its result is here
            if stream is None and part not in self._results:
                raise ApiError(503, "the request is just being dropped.", code="aborted")
            streams.append(stream or self._llm.ended(self._results[part], kind))
        return streams

    # ------------------------------------------------------------------------------------------------------ keeping

    def _take(self, outputs: list[RequestOutput]) -> None:
        """On the engine's thread: results."""
        for output in outputs:
            if not output.finished or self._taken:
                continue
            with self._lock:
                entry = self._owners.get(output.request_id)
                if entry is None or self._store is None:
                    continue
                self._results[output.request_id] = output
                if all(part in self._results for part in entry.parts):
                    entry.finished_at = time.time()
                self._store.append({"result": record_of_result(output)})

    def _last_state_and_pool(self, engine: LLMEngine) -> tuple[State, Tree]:
        """Requests that end between the signal and this moment are among the results."""
        self._taken = True
        return self._state_and_pool(engine)

    def _state(self, engine: LLMEngine) -> State:
        """On the engine's thread: everything at this moment."""
        with self._lock:
            entries = [entry for name, entry in self._entries.items() if name in self._journaled]
            results = [self._results[part] for e in entries for part in e.parts if part in self._results]
            unfinished = [part for e in entries for part in e.parts if part not in self._results]
        return State(
            entries=entries,
            results=[record_of_result(output) for output in results],
            engine=engine.snapshot(unfinished),
        )

    def _state_and_pool(self, engine: LLMEngine) -> tuple[State, Tree]:
        wanted = self._config.snapshot_pool
        return self._state(engine), read_cache(engine.blocks, engine.runner) if wanted else {}

    async def save(self) -> None:
        """Writes a snapshot; the engine goes on meanwhile.

        Raises:
          SnapshotError: it can't be written. The last one and the journals are there still.
        """
        async with self._saving:
            if self.is_open:
                await self._write(self._store.begin())  # type: ignore[union-attr]  # it is open

    async def _write(self, number: int) -> None:
        store: Store = self._store  # type: ignore[assignment]  # it is open
        state = await self._llm.call(self._state)
        await asyncio.to_thread(lambda: store.save(number, encode(state)))
        self._saved_at = time.monotonic()

    async def _tick(self) -> None:
        every, store = self._config.snapshot_interval, self._store
        while True:
            await asyncio.sleep(_TICK)
            self.expire(time.time())
            due = 0 < every <= time.monotonic() - self._saved_at
            if due or store.journal_size > MAX_JOURNAL_BYTES:  # type: ignore[union-attr]  # it ticks while it is open
                try:
                    await self.save()
                except SnapshotError as error:
                    log.error("%s", error)
                    self._saved_at = time.monotonic()  # not again at once

    def expire(self, now: float) -> None:
        """Forgets results that are old, or too many."""
        with self._lock:
            finished = sorted(
                (entry for entry in self._entries.values() if entry.finished_at is not None),
                key=lambda entry: -entry.finished_at,  # type: ignore[operator]  # they have one
            )
            size, old = 0, []
            for i, entry in enumerate(finished):
                size += sum(_size(self._results[part]) for part in entry.parts)
                too_old = entry.kept and now - entry.finished_at > self._config.result_ttl  # type: ignore[operator]
                if too_old or i >= self._config.max_kept_results or size > MAX_RESULT_BYTES:
                    old.append(entry)
        for entry in old:
            self.forget(entry)


def _load(store: Store) -> tuple[State, Tree] | None:
    loaded = store.load()
    return None if loaded is None else (decode(*loaded[:2]), loaded[2])


def _size(output: RequestOutput) -> int:
    """About how many bytes a result takes."""
    size = _BYTES_A_TOKEN * len(output.prompt_token_ids) + len(output.prompt or "")
    for at in output.prompt_logprobs or ():
        size += _BYTES_A_LOGPROB * len(at or ())
    for completion in output.outputs:
        size += _BYTES_A_TOKEN * len(completion.token_ids) + len(completion.text)
        size += sum(_BYTES_A_LOGPROB * len(at) for at in completion.logprobs or ())
    return size
