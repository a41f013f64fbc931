"""Host time of one decode step without a model: schedule + pack + commit, as LLMEngine runs them.

    python benchmarks/scheduler_overhead.py [--sequences 16 64 256 1024] [--steps 320] [--json out.json] [--profile]

Prompts of about 128 tokens, prefix caching on, a block grown every 16 tokens (so 1 row in 16 grows at each step), and
a step is committed one step late. Times are medians over the steps; the mean is given as well, because the median
does not see rare steps.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import time
from collections import deque
from pathlib import Path

import numpy as np

from jpaged.memory import BlockManager
from jpaged.outputs import RequestMetrics
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import Scheduler, StepPlan
from jpaged.scheduling.plan import make_buckets
from jpaged.sequence import Sequence, SequenceGroup

BLOCK_SIZE, TILE_SIZE, PROMPT = 16, 32, 128
PARTS = ("schedule", "pack", "commit")


class NullEngine:
    """The host side of LLMEngine over a device that answers at once.

    Args:
      num_sequences: how many run together.
      max_tokens: output length of each.
    """

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        longest = PROMPT + BLOCK_SIZE + max_tokens
        blocks_per_row = -(-longest // BLOCK_SIZE)
        self.null_row = num_sequences
        self.blocks = BlockManager(
            num_sequences * blocks_per_row * 11 // 10 + 2, BLOCK_SIZE, num_sequences, blocks_per_row
        )
        self.scheduler = Scheduler(
            self.blocks,
            make_buckets(num_sequences, 64, TILE_SIZE),
            tile_size=TILE_SIZE,
            max_num_batched_tokens=num_sequences + 64 * TILE_SIZE,
        )
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(1000, 50_000, (num_sequences, 64))
        for i in range(num_sequences):
            prompt = rng.integers(1000, 50_000, PROMPT - BLOCK_SIZE // 2 + i % BLOCK_SIZE).tolist()
            group = SequenceGroup(
                f"{i}", None, prompt, SamplingParams(max_tokens=max_tokens), i, (0, i), RequestMetrics(arrival_time=0.0)
            )
            group.sequences = [Sequence(group, 0, list(prompt), len(prompt) + max_tokens, frozenset({2}))]
            self.scheduler.add(group)
        self.in_flight: deque[tuple[StepPlan, np.ndarray]] = deque()
        self._turn = itertools.count()

    def step(self) -> tuple[float, float, float]:
        """One step; seconds spent in each of `PARTS`."""
        clock = time.perf_counter
        start = clock()
        plan = self.scheduler.schedule()
        scheduled = clock()
        if plan is None:
            raise RuntimeError("the sequences ended before the measurement")
        plan.pack(self.null_row)
        packed = clock()
        results = np.resize(self.tokens[:, next(self._turn) % 64], (plan.bucket.num_results, 1))
        self.in_flight.append((plan, results))
        begin = clock()
        if len(self.in_flight) > 1:
            plan, results = self.in_flight.popleft()
            self.scheduler.commit(plan, results)
        return scheduled - start, packed - scheduled, clock() - begin

    def start(self) -> None:
        """Steps until every sequence decodes."""
        while self.scheduler.num_waiting or self.scheduler._admission.catching_up:
            self.step()
        for _ in range(2 * BLOCK_SIZE):
            self.step()


def measure(num_sequences: int, steps: int) -> dict[str, float]:
    """Times in microseconds."""
    engine = NullEngine(num_sequences, max_tokens=steps + num_sequences * PROMPT // (64 * TILE_SIZE) + 100)
    engine.start()
    samples = np.array([engine.step() for _ in range(steps)]) * 1e6
    engine.blocks.check_invariants()
    total = samples.sum(axis=1)
    median = float(np.median(total))
    row = {
        "sequences": num_sequences,
        "median_us": median,
        "mean_us": float(total.mean()),
        "p99_us": float(np.percentile(total, 99)),
        "us_per_sequence": median / num_sequences,
    }
    parts = np.median(samples, axis=0).tolist()
    return row | {f"{name}_us": part for name, part in zip(PARTS, parts, strict=True)}


def profile(num_sequences: int, steps: int) -> None:
    engine = NullEngine(num_sequences, max_tokens=steps + 200)
    engine.start()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=320, help="decode steps measured")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    arguments = parser.parse_args()
    if arguments.profile:
        for count in arguments.sequences:
            profile(count, arguments.steps)
        return
    rows = [measure(count, arguments.steps) for count in arguments.sequences]
    columns = list(rows[0])
    print("  ".join(f"{c:>16}" for c in columns))
    for row in rows:
        print("  ".join(f"{row[c]:>16.2f}" if isinstance(row[c], float) else f"{row[c]:>16}" for c in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "scheduler_overhead", "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
