"""What HTTP costs: one workload through `jpaged serve` and through `LLM.generate`, in turn, in one process tree.

    python -m benchmarks.http_overhead [--rounds 5]

This process holds the offline engine and is the client of the server, its child. All requests come at once, are decoded
greedily to full length, and stream. While one side runs the other is idle, and a round's ratio is of neighbours in
time. Where both share the processor the client's work counts as the server's, so the client does little: it counts.

ratio: output tokens per second, HTTP to offline; means something on a machine that does nothing else.
cpu_ratio: processor time per token, offline to HTTP (server and client together); that holds on a busy machine too.
"""

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import time

import httptools
import numpy as np
import psutil

from jpaged import LLM, SamplingParams
from jpaged.cli.bench.workloads import Ask, random_asks


def main() -> None:
    args = parse_args()
    settings = {
        "model": args.model,
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.max_model_len,
        "num_gpu_blocks_override": args.max_num_seqs * args.max_model_len // 16,
        "enable_prefix_caching": False,  # the same prompts come again
    }
    random = np.random.default_rng(0)
    asks = random_asks(args.num_prompts, args.input_len, args.output_len, 0.5, text=False, random=random)
    llm, rounds = LLM(**settings), []
    with Served(settings) as (port, server):
        for number in range(args.rounds + 1):
            offline, http = through_llm(llm, asks), through_http(port, server, args.model, asks)
            row = {f"offline_{name}": value for name, value in offline.items()}
            row |= {f"http_{name}": value for name, value in http.items()}
            row["ratio"] = http["tok_s"] / offline["tok_s"]
            row["cpu_ratio"] = offline["cpu_ms_per_tok"] / http["cpu_ms_per_tok"]
            print("round" if number else "warm ", rounded(row), flush=True)
            rounds += [row] if number else []
    print("RESULT " + rounded({name: statistics.median(row[name] for row in rounds) for name in rounds[0]}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def rounded(row: dict[str, float]) -> str:
    return json.dumps({name: round(value, 3) for name, value in row.items()})


def through_llm(llm: LLM, asks: list[Ask]) -> dict[str, float]:
    prompts = [{"prompt_token_ids": ask.prompt} for ask in asks]
    params = [SamplingParams(temperature=0, max_tokens=ask.output_len, ignore_eos=True) for ask in asks]
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tok_s": tokens / elapsed, "cpu_ms_per_tok": 1e3 * cpu / tokens}


def through_http(port: int, server: psutil.Process, model: str, asks: list[Ask]) -> dict[str, float]:
    def cpu_time() -> float:
        return time.process_time() + sum(server.cpu_times()[:2])

    async def ask_all() -> list[float]:
        return await asyncio.gather(*(stream(port, model, ask) for ask in asks))

    start, cpu = time.perf_counter(), cpu_time()
    ttfts = asyncio.run(ask_all())
    elapsed, cpu = time.perf_counter() - start, cpu_time() - cpu
    tokens = sum(ask.output_len for ask in asks)
    return {
        "tok_s": tokens / elapsed,
        "cpu_ms_per_tok": 1e3 * cpu / tokens,
        "p50_ttft_ms": 1e3 * float(np.percentile(ttfts, 50)),
        "p99_ttft_ms": 1e3 * float(np.percentile(ttfts, 99)),
    }


async def stream(port: int, model: str, ask: Ask) -> float:
    """Streams a completion to its end; returns the time to its first token."""
    body = {"model": model, "prompt": ask.prompt, "max_tokens": ask.output_len, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    answer, start, first = Answer(), time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"\r\n\r\n" + content)
    while not answer.complete:
        answer.parser.feed_data(await reader.read(1 << 16))
        first = first or (time.perf_counter() if b"data: " in answer.body else 0.0)
    writer.close()
    usage = json.loads(answer.body.split(b"data: ")[-2])["usage"]  # the last one is [DONE]
    if usage["completion_tokens"] != ask.output_len:
        raise RuntimeError(f"{usage} instead of {ask.output_len} tokens")
    return first - start


class Answer:
    """What the HTTP parser calls."""

    def __init__(self) -> None:
        self.parser, self.body, self.complete = httptools.HttpResponseParser(self), bytearray(), False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class Served:
    """A server with these settings, while the block lasts; gives its port and its process."""

    def __init__(self, settings: dict) -> None:
        flags = [part for name, value in settings.items() if name != "model" for part in flag(name, value)]
        command = [sys.executable, "-m", "jpaged.cli.main", "serve", settings["model"], "--port", "0", *flags]
        self._process = subprocess.Popen([*command, "--disable-log-stats"], stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> tuple[int, psutil.Process]:
        for line in self._process.stderr:
            if found := re.search(r"jpaged is ready on \S+:(\d+)", line):
                return int(found[1]), psutil.Process(self._process.pid)
        raise RuntimeError("the server did not start")

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()


def flag(name: str, value: object) -> list[str]:
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    return [f"--{word}", str(value)]


if __name__ == "__main__":
    main()
