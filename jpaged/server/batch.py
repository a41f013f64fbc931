"""OpenAI batch files: a request on each line in, its result on a line out. A run that was cut off goes on.

in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
out  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}},
      "error": null}

Results come in the order in which they are ready. Their file says what is done: a run skips lines that have one.
"""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import httpx2 as httpx
from pydantic import ValidationError
from pydantic_core import from_json

from jpaged.errors import EngineDeadError, InvalidConfigError
from jpaged.server.protocol import Name, Strict

MAX_TRIES = 8
"""Times that a request is sent to a server which has too much to do."""
_BUSY = (429, 503)
_NO_RESULTS = ("engine_dead", "aborted")
"""Codes of errors that say nothing about the request: the next run sends it again."""


class Line(Strict):
    """A request of a batch file."""

    custom_id: Name
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score"]
    body: dict[str, Any]


@dataclasses.dataclass
class Counts:
    """Lines of a batch."""

    done: int = 0
    """That got a result in this run."""
    failed: int = 0
    """Of these: whose result is an error."""
    skipped: int = 0
    """That had a result before."""


class ResultFile:
    """The results of a batch, of this run and of those before it.

    Args:
      path: made if there is none. A last line that was not written to its end is cut off.

    Raises:
      InvalidConfigError: the file can't be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[str | int] = set()
        """The custom_id of each request that has a result; of lines without a usable one, their number."""
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InvalidConfigError(f"{path}: {error.strerror}.") from error
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.done.add(_key_of(path, line))
            whole += len(line)
        self._file.truncate(whole)

    def write(self, custom_id: str | None, response: dict | None, error: dict | None) -> None:
        """Adds a line's result; it is in the file when this returns."""
        identity = f"batch_req_{uuid.uuid4().hex}"
        result = {"id": identity, "custom_id": custom_id, "response": response, "error": error}
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _key_of(path: Path, line: bytes) -> str | int:
    try:
        result = json.loads(line)
        number = (result["error"] or {}).get("line")
        return result["custom_id"] if number is None else number
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidConfigError(f"{path} holds something that is no result of a batch: use another file.") from error


async def run_batch(
    client: httpx.AsyncClient,
    source: Path,
    results: ResultFile,
    *,
    max_concurrency: int,
    on_line: Callable[[], None] = lambda: None,
) -> Counts:
    """Sends every line that has no result yet, `max_concurrency` at once, and writes the results.

    Args:
      client: of the server.
      on_line: called when a line has its result.

    Raises:
      InvalidConfigError: the source can't be read.
      EngineDeadError: the server or its engine is gone. Another run goes on from here.
    """
    counts, places = Counts(), asyncio.Semaphore(max_concurrency)

    def done(custom_id: str | None, response: dict | None, error: dict | None) -> None:
        results.write(custom_id, response, error)
        counts.done, counts.failed = counts.done + 1, counts.failed + (error is not None)
        on_line()

    async def send(line: Line) -> None:
        try:
            response = await _send(client, line)
        finally:
            places.release()
        done(line.custom_id, response, _error_of(response) if response["status_code"] >= 400 else None)

    try:
        async with asyncio.TaskGroup() as group:
            for number, line in _lines(source):
                if (number if isinstance(line, str) else line.custom_id) in results.done:
                    counts.skipped += 1
                    on_line()
                elif isinstance(line, str):
                    done(None, None, {"code": "invalid_line", "message": line, "line": number})
                else:
                    await places.acquire()
                    group.create_task(send(line))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return counts


def _lines(source: Path) -> Iterator[tuple[int, Line | str]]:
    """(number from 1 on, request or what is wrong with it) of each line that is not empty."""
    seen: set[str] = set()
    try:
        with source.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield number, _parse(number, raw, seen)
    except OSError as error:
        raise InvalidConfigError(f"{source}: {error.strerror}.") from error


def _parse(number: int, raw: bytes, seen: set[str]) -> Line | str:
    try:
        line = Line.model_validate(from_json(raw, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        return f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}."
    except ValueError as error:
        return f"line {number} is not JSON: {error}."
    if line.custom_id in seen:
        return f"line {number}: the custom_id {line.custom_id!r} is that of an earlier line."
    if line.body.get("stream"):
        return f"line {number}: a batch is not streamed: leave 'stream' out."
    seen.add(line.custom_id)
    return line


async def _send(client: httpx.AsyncClient, line: Line) -> dict[str, Any]:
    """The response as a batch has it. A server that is busy is asked again, later each time."""
    for tries in range(MAX_TRIES):
        try:
            answer = await client.post(line.url, json=line.body)
        except httpx.HTTPError as error:
            raise EngineDeadError(f"the server is gone ({type(error).__name__}): start again to go on.") from error
        body = _body_of(answer)
        code = _error_of({"status_code": answer.status_code, "body": body})["code"]
        if code in _NO_RESULTS:
            raise EngineDeadError("the engine has stopped: start again to go on.")
        if answer.status_code not in _BUSY:
            break
        await asyncio.sleep(max(float(answer.headers.get("retry-after") or 1), 2.0**tries / 4))
    request_id = body.get("id") or f"req-{uuid.uuid4().hex}"
    return {"status_code": answer.status_code, "request_id": request_id, "body": body}


def _body_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {"error": {"message": answer.text[:1000], "code": None}}


def _error_of(response: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's {"code", "message"} of a response, from what its body says."""
    error = response["body"].get("error")
    error = error if isinstance(error, dict) else {}
    return {"code": error.get("code") or str(response["status_code"]), "message": str(error.get("message") or "")}
