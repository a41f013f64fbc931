"""Hundreds of streams on one server for minutes, with random cancels, slow readers and half-open connections.

    python -m benchmarks.soak.streams [MODEL] [--streams 200] [--seconds 300]

Starts `jpaged serve` in a process of its own. At the end it is checked that every text that was read to its end equals
the offline engine's, that no request and no block is left, and that the server's memory did not grow; how long /health
took, from another process, is printed. The exit status is 1 if a text was wrong or something was left.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import multiprocessing
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.soak.clients import Crowd
from benchmarks.soak.requests import bodies, expected

PROBES_A_SECOND = 10
_SETTLE = 60.0
"""Seconds in which a server must have noticed that nobody is left."""


def main() -> int:
    args = parse_args()
    in_a_process = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    want = in_a_process.submit(expected, args.model, args.max_num_seqs, args.max_tokens).result()
    in_a_process.shutdown()
    with serving(args.model, args.max_num_seqs, args.serve_arg) as (url, pid):
        return report(*soak(args, url, pid, want))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-arg", action="append", default=[], help="one more argument of jpaged serve")
    return parser.parse_args()


@contextlib.contextmanager
def serving(model: str, max_num_seqs: int, more: list[str]) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server, as long as the block lasts."""
    command = [sys.executable, "-m", "jpaged.cli.main", "serve", model, "--port", "0"]
    command += ["--max-num-seqs", str(max_num_seqs), "--log-format", "json", "--slow-step", "2", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if ready := re.search(r"ready on (http:[\w.:/]+)", line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()
        yield ready[1], process.pid
    finally:
        process.terminate()
        process.wait()


def _pass_on(lines: Iterator[str]) -> None:
    for line in lines:
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            if told["level"] != "info" or "tokens/s" in told.get("message", ""):
                print(line, end="", file=sys.stderr, flush=True)


def soak(args: argparse.Namespace, url: str, pid: int, want: list[list[str]]) -> tuple[Crowd, list[float], dict]:
    """(the clients, seconds that /health took, what is left)"""
    crowd, memory, over = Crowd(url, bodies(args.max_tokens), want, args.seed), [], threading.Event()

    def watch() -> None:
        while not over.wait(2.0):
            memory.append(resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as prober:
        probing = prober.submit(probe, url, args.seconds)
        asyncio.run(crowd.run(args.streams, args.seconds))
        health = probing.result()
    over.set()
    watcher.join()
    left = settle(url)
    half = memory[len(memory) // 2 :] or [0]
    left["memory_mib"] = [round(m / 2**20) for m in (memory or [0])[:: max(1, len(memory) // 8)]]
    left["memory_growth"] = max(half) / max(1, half[0]) - 1
    return crowd, health, left


def probe(url: str, seconds: float) -> list[float]:
    """Seconds that /health took, again and again, on one connection. For a process that does nothing else."""
    parts, taken, deadline = urlsplit(url), [], time.monotonic() + seconds
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    while (start := time.monotonic()) < deadline:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"/health: {answer.status}")
        taken.append(time.monotonic() - start)
        time.sleep(1 / PROBES_A_SECOND)
    return taken


def resident(pid: int) -> int:
    """Bytes of a process's memory that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def settle(url: str) -> dict:
    """What the server still holds when everybody has gone, after the time that it may need to notice."""
    deadline = time.monotonic() + _SETTLE
    while True:
        with urllib.request.urlopen(url + "/metrics", timeout=60) as answer:
            found = dict(re.findall(r"^jpaged:(\w+)\{[^}]*\} (\S+)$", answer.read().decode(), re.MULTILINE))
        names = ("num_requests_running", "num_requests_waiting", "num_requests_swapped", "kv_cache_usage_perc")
        left = {name: float(found[name]) for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def report(crowd: Crowd, health: list[float], left: dict) -> int:
    print("streams     ", dict(crowd.counts))
    print("wrong       ", len(crowd.wrong), *crowd.wrong[:5], sep="\n  " if crowd.wrong else " ")
    for name, values in (("health", health), ("first token", crowd.first_tokens), ("gap", crowd.gaps)):
        ranked = sorted(values) or [0.0]
        at = {p: ranked[min(len(ranked) - 1, len(ranked) * p // 100)] for p in (50, 95, 99)}
        shown = ", ".join(f"p{p} {value:.3f} s" for p, value in at.items())
        print(f"{name:<12} {shown}, most {ranked[-1]:.3f} s ({len(values)})")
    print("left        ", left)
    held = any(value for name, value in left.items() if not name.startswith("memory"))
    return 1 if crowd.wrong or held else 0


if __name__ == "__main__":
    sys.exit(main())
