"""Replays a workload through the engine, and through other engines in the same sitting.

    python -m benchmarks.engine WORKLOAD.json [--tokens WORKLOAD.tokens.json]
    python -m benchmarks.engine WORKLOAD.json --peer 'vllm=python run_vllm.py w1' --rounds 3

A workload is {"name": ..., "requests": [{"prompt_token_ids": [...], "max_tokens": n}, ...]}; all requests arrive at
once, are decoded greedily and ignore the end-of-sequence token. A peer is any command that prints a line
`RESULT {"out_tok_s": ..., "peak_rss_mb": ..., "ttft_mean": ...}`; ours runs as such a command too, in turn with them,
so that ratios are of one sitting.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    args = parse_args()
    if args.peer:
        compare(args)
    else:
        print("RESULT " + json.dumps(measure(args)), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--tokens", type=Path, help="expected tokens, a list of lists: checked")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--reps", type=int, default=3, help="timed repetitions after one that is not")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--prefill-tile-size", type=int)
    parser.add_argument(
        "--num-blocks", type=int, default=1456, help="of the pool; 1456 of SmolLM2's are 1 GiB in float32"
    )
    parser.add_argument("--speculate", type=int, metavar="N", help="guess up to N tokens at a time, by prompt lookup")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--no-warmup", action="store_true", help="compile only what the workload needs")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=1, help="how often each peer is run, in turn with us")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict:
    """Runs the workload `reps` times in this process; medians."""
    from jpaged import LLMEngine

    workload = json.loads(args.workload.read_text())
    start = time.perf_counter()
    engine = LLMEngine(
        model=args.model,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefill_tile_size=args.prefill_tile_size,
        num_gpu_blocks_override=args.num_blocks,
        enable_prefix_caching=not args.no_prefix_caching,
        speculative_config={"num_speculative_tokens": args.speculate} if args.speculate else None,
        warmup=not args.no_warmup,
    )
    ready = time.perf_counter() - start
    rows = []
    for rep in range(args.reps + 1):
        engine.blocks.reset_prefix_cache()
        row, tokens = replay(engine, workload["requests"])
        print(f"{'warm' if rep == 0 else 'rep '} {json.dumps(row)}", file=sys.stderr, flush=True)
        if rep:
            rows.append(row)
    result = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result |= {
        "engine": "jpaged",
        "workload": workload["name"],
        "dtype": args.dtype,
        "ready_s": round(ready, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    if args.tokens:
        expected = json.loads(args.tokens.read_text())
        result["tokens_equal"] = f"{sum(a == b for a, b in zip(tokens, expected, strict=True))}/{len(expected)}"
    return result


def replay(engine, requests: list[dict]) -> tuple[dict, list[list[int]]]:
    """One pass: (figures, tokens of each request)."""
    from jpaged import RequestOutputKind, SamplingParams

    engine.times.reset()
    start = time.perf_counter()
    for i, request in enumerate(requests):
        params = SamplingParams(
            temperature=0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(i), {"prompt_token_ids": request["prompt_token_ids"]}, params)
    outputs, waste = {}, []
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
        slots = int(engine.blocks.counts.sum()) * engine.blocks.block_size
        if slots:
            waste.append(1 - int(engine.scheduler.batch.position.sum()) / slots)
    elapsed = time.perf_counter() - start
    done = [outputs[str(i)] for i in range(len(requests))]
    tokens = [output.outputs[0].token_ids for output in done]
    steps = engine.times.steps
    row = {
        "out_tok_s": sum(map(len, tokens)) / elapsed,
        "elapsed_s": elapsed,
        "ttft_mean": statistics.mean(output.metrics.time_to_first_token for output in done),
        "steps": steps,
        "step_ms": 1e3 * elapsed / steps,
        "host_ms_per_step": 1e3 * engine.times.host / steps,
        "device_wait_ms_per_step": 1e3 * engine.times.wait / steps,
        "pool_waste": statistics.mean(waste),
        "cached_tokens": sum(output.num_cached_tokens for output in done),
    }
    return {name: round(value, 4) for name, value in row.items()}, tokens


def compare(args: argparse.Namespace) -> None:
    """Runs us and the peers in turn, each in a process of its own, and prints medians and ratios."""
    ours = [sys.executable, "-m", "benchmarks.engine", *without_peers(sys.argv[1:])]
    commands = {"jpaged": ours} | {
        name: ["bash", "-c", command] for name, _, command in (peer.partition("=") for peer in args.peer)
    }
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{name}: no RESULT line, exit {done.returncode}: {done.stderr[-500:]}", file=sys.stderr)
                continue
            results[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(f"{name}: {lines[-1]}", flush=True)
    print("\n| engine | out tok/s | ours / theirs | mean TTFT s | peak RSS MB |\n|---|---|---|---|---|")
    rates = {name: statistics.median(r["out_tok_s"] for r in rows) for name, rows in results.items() if rows}
    for name, rate in rates.items():
        last = results[name][-1]
        print(
            f"| {name} | {rate:.1f} | {rates['jpaged'] / rate:.2f} | {last.get('ttft_mean', float('nan')):.2f} | "
            f"{last.get('peak_rss_mb', float('nan')):.0f} |"
        )


def without_peers(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(("--peer=", "--rounds=")):
            skip = False
        elif argument in ("--peer", "--rounds"):
            skip = True
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
