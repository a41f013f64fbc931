"""kill -9 at random moments: does every client get the text that it would have got from an undisturbed server?

    python -m benchmarks.soak.kill_and_resume --kills 20 --requests 12

A server with a --snapshot-dir serves streams and whole answers of many kinds. It is killed when its clients have
received random numbers of tokens, and started again; clients come back with the id of the last event that they have.
The same requests go to a server that nobody disturbs. Texts and tokens must be equal. Prints JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

Choices = dict[int, tuple[str, list[int]]]
"""Text and token ids by choice."""
_START_TIMEOUT = 600.0


class Server:
    """A `jpaged serve` that can be killed and started again; clients wait for the next one meanwhile."""

    def __init__(self, model: str, folder: Path, flags: list[str]) -> None:
        self.socket = str(folder / "socket")
        self.log: list[str] = []
        self._command = [sys.executable, "-m", "jpaged.cli.main", "serve", model, "--uds", self.socket]
        self._command += ["--snapshot-dir", str(folder / "state"), "--disable-log-stats", *flags]
        self._changed = threading.Condition()
        self._generation = 0
        """Servers that have become ready."""

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        ready = threading.Event()
        self._reading = threading.Thread(target=self._read, args=(self._process.stderr, ready), daemon=True)
        self._reading.start()
        if not ready.wait(_START_TIMEOUT) or self._process.poll() is not None:
            raise RuntimeError("the server did not start:\n" + "".join(self.log[-40:]))
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def _read(self, stderr: Any, ready: threading.Event) -> None:
        for line in stderr:
            self.log.append(line)
            if "is ready on" in line:
                ready.set()
        ready.set()

    def end(self, how: signal.Signals) -> int:
        """Sends a signal; returns the exit status."""
        self._process.send_signal(how)
        status = self._process.wait()
        self._reading.join()
        return status

    @property
    def generation(self) -> int:
        return self._generation

    def wait_for_next(self, generation: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._generation > generation, _START_TIMEOUT):
                raise RuntimeError("no server came back")

    @property
    def num_resumed(self) -> int:
        """Unfinished requests that starts have resumed, together."""
        return sum(int(found[1]) for line in self.log if (found := re.search(r"resumed (\d+) unfinished", line)))


@dataclasses.dataclass
class Client:
    """One request, asked for until its answer is complete."""

    name: str
    body: dict[str, Any]
    path: str = "/v1/completions"
    choices: Choices = dataclasses.field(default_factory=dict)
    attempts: int = 0
    accepted: threading.Event = dataclasses.field(default_factory=threading.Event)
    error: BaseException | None = None

    def run(self, server: Server, count_tokens: Any) -> None:
        try:
            last = None
            while True:
                generation = server.generation
                self.attempts += 1
                transport = httpx.HTTPTransport(uds=server.socket)
                try:
                    with httpx.Client(base_url="http://server", transport=transport, timeout=_START_TIMEOUT) as http:
                        for event_id, data in self._ask(http, last):
                            last = event_id or last
                            count_tokens(self._take(data))
                    return
                except (httpx.TransportError, _ServerGone):
                    server.wait_for_next(generation)
        except BaseException as error:
            self.error = error
            self.accepted.set()

    def _ask(self, http: httpx.Client, last: str | None) -> Iterator[tuple[str | None, dict[str, Any]]]:
        headers = {"X-Request-Id": self.name}
        if not self.body.get("stream"):  # the same again is the same request
            answer = http.post(self.path, json=self.body, headers=headers)
            if answer.status_code == 503:
                raise _ServerGone
            answer.raise_for_status()
            yield None, answer.json()
            return
        asked: dict[str, Any] = {"method": "POST", "url": self.path, "json": self.body}
        if last is not None:
            asked = {"method": "GET", "url": f"/v1/requests/{self.name}"}
            headers = {"Last-Event-ID": last}
        with http.stream(**asked, headers=headers) as answer:
            if answer.status_code == 503:
                raise _ServerGone
            answer.raise_for_status()
            self.accepted.set()
            yield from _events(answer)

    def _take(self, data: dict[str, Any]) -> int:
        new = 0
        for choice in data["choices"]:
            text, tokens = self.choices.get(choice["index"], ("", []))
            part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            more = choice.get("token_ids") or []
            new += len(more)
            self.choices[choice["index"]] = text + (part.get("content") or ""), tokens + more
        return new


class _ServerGone(Exception):
    """It said so itself."""


def _events(answer: httpx.Response) -> Iterator[tuple[str | None, dict[str, Any]]]:
    event_id, ended = None, False
    for line in answer.iter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            data = json.loads(line[6:])
            if data.get("error", {}).get("code") in ("suspended", "engine_dead"):
                raise _ServerGone
            yield event_id, data
    if not ended:
        raise _ServerGone


def clients(number: int, max_tokens: int) -> list[Client]:
    """Requests of every kind: streamed ones first, so that they arrive in one order."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9},  # the seed is the engine's
        {"temperature": 1.0, "seed": 3, "n": 3, "logprobs": 2},
        {"temperature": 0.8, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        {"temperature": 0.7, "structured_outputs": {"regex": r"[a-z ]{40,90}\."}, "ignore_eos": False},
        {"temperature": 0.9, "seed": 5, "stop": ["z", "qu"], "n": 2},
        {"temperature": 0, "use_beam_search": True, "n": 2, "best_of": 3, "max_tokens": max(4, max_tokens // 3)},
        {"temperature": 0.9, "seed": 6, "stream": False, "n": 2},
        {"temperature": 0, "use_beam_search": True, "n": 2, "max_tokens": max(4, max_tokens // 3), "stream": False},
    ]
    made = []
    for i in range(number):
        body = {"prompt": f"{i}. Once upon a time, there was a" + " very" * (i % 7), "max_tokens": max_tokens}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True, **kinds[i % len(kinds)]}
        made.append(Client(f"request-{i}", body))
    return sorted(made, key=lambda client: not client.body["stream"])


def run(server: Server, requests: list[Client], moments: list[int], signals: list[signal.Signals]) -> float:
    """Lets all requests run to their ends; ends the server whenever clients have received so many tokens.

    Returns: the seconds that it took.
    """
    received, more = 0, threading.Condition()
    running = len(requests)

    def count(tokens: int) -> None:
        nonlocal received
        with more:
            received += tokens
            more.notify_all()

    def work(client: Client) -> None:
        nonlocal running
        client.run(server, count)
        with more:
            running -= 1
            more.notify_all()

    begun = time.monotonic()
    server.start()
    threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in requests]

    def submit() -> None:
        for client, thread in zip(requests, threads, strict=True):
            thread.start()
            if client.body["stream"]:
                client.accepted.wait()

    submitting = threading.Thread(target=submit, daemon=True)
    submitting.start()
    for moment, how in zip(moments, signals, strict=True):
        with more:
            more.wait_for(lambda: received >= moment or not running)  # noqa: B023  # waited for at once
        server.end(how)
        print(f"{how.name} at {received} tokens; {running} requests are unfinished", file=sys.stderr, flush=True)
        server.start()
    submitting.join()
    for thread in threads:
        thread.join()
    server.end(signal.SIGTERM)
    for client in requests:
        if client.error is not None:
            raise client.error
    return time.monotonic() - begun


def compare(
    model: str, flags: list[str], number: int, max_tokens: int, kills: int, seed: int, terms: int = 0
) -> dict[str, Any]:
    """The report: how many requests ended otherwise than on an undisturbed server, which should be none.

    Args:
      terms: so many of the kills are SIGTERM instead.
    """
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as rough:
        want = clients(number, max_tokens)
        run(Server(model, Path(calm), flags), want, [], [])
        total = sum(len(tokens) for client in want for _, tokens in client.choices.values())
        streamed = sum(len(t) for client in want if client.body["stream"] for _, t in client.choices.values())
        dice = random.Random(seed)
        moments = sorted(dice.sample(range(streamed * 9 // 10), kills))
        signals = [signal.SIGTERM] * terms + [signal.SIGKILL] * (kills - terms)
        dice.shuffle(signals)
        got, server = clients(number, max_tokens), Server(model, Path(rough), flags)
        seconds = run(server, got, moments, signals)
        left = [path.name for path in (Path(rough) / "state").iterdir()]
    differing = [a.name for a, b in zip(got, want, strict=True) if a.choices != b.choices]
    return {
        "model": model,
        "requests": number,
        "tokens": total,
        "kill_moments": moments,
        "sigterms": terms,
        "resumed": server.num_resumed,
        "attempts": sum(client.attempts for client in got),
        "differing": differing,
        "seconds": round(seconds, 1),
        "files_left": len(left),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=0, help="so many of the kills are SIGTERM instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of jpaged serve, after --")
    given = parser.parse_args()
    report = compare(given.model, given.flags, given.requests, given.max_tokens, given.kills, given.seed, given.terms)
    print(json.dumps(report, indent=1))
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    return 1 if report["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
