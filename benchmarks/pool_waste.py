"""How much of the pool holds no token? The paper's figure 2, with the real scheduler and block manager and no model.

    python benchmarks/pool_waste.py LENGTHS.csv[.gz] [--block-size 16] [--slots 15728] [--requests 5000] [--json OUT]

LENGTHS has the columns arrival_s, prompt_tokens, output_tokens. The arrivals are overload: the queue is never empty,
so the pool is as full as the scheduler can make it. The default pool is that of OPT-13B on an A100-40GB. Prefix
caching is off: nothing is shared, and nothing is kept for later.

Every step, after it has been planned, an allocated slot is one of

    written     its K and V have been computed, this step included
    reserved    a known token belongs there, and a later chunk of its prompt will compute it
    empty       the rest of a sequence's last block: the paper's internal fragmentation

and the averages are over the steps in which the pool is saturated: somebody waits because blocks are short.
"""

import argparse
import csv
import gzip
import itertools
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jpaged.memory import BlockManager
from jpaged.outputs import RequestMetrics
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import Scheduler, StepPlan
from jpaged.scheduling.plan import make_buckets
from jpaged.sequence import Sequence, SequenceGroup

TILE_SIZE = 32
QUEUE = 16
"""Requests that always wait."""


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of every request."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        return [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]


def make_group(number: int, prompt_tokens: int, output_tokens: int) -> SequenceGroup:
    params = SamplingParams(max_tokens=output_tokens, temperature=0)
    prompt = [0] * prompt_tokens
    group = SequenceGroup(f"{number}", None, prompt, params, 0, (0, number), RequestMetrics(arrival_time=0.0))
    group.sequences = [Sequence(group, 0, list(prompt), prompt_tokens + output_tokens)]
    return group


class Replay:
    """Requests through a scheduler, step by step, with a device that answers one step late.

    Args:
      lengths: (prompt tokens, output tokens) of the requests, in the order of their arrival.
      max_len: prompts that are longer are left out, outputs are cut to it.
    """

    def __init__(
        self,
        lengths: Iterator[tuple[int, int]],
        *,
        slots: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_len: int,
        watermark: float,
    ) -> None:
        self.blocks = BlockManager(
            slots // block_size + 1,
            block_size,
            max_num_seqs,
            -(-max_len // block_size),
            watermark=watermark,
            enable_prefix_caching=False,
        )
        tiles = max_num_batched_tokens // TILE_SIZE
        self.scheduler = Scheduler(
            self.blocks,
            make_buckets(max_num_seqs, tiles, TILE_SIZE),
            tile_size=TILE_SIZE,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        fitting = ((p, min(o, max_len - p)) for p, o in lengths if 0 < p < max_len and o)
        self._groups = (make_group(i, p, o) for i, (p, o) in enumerate(fitting))
        self._in_flight: deque[StepPlan] = deque()
        self.num_added = 0
        self.num_computed = 0  # tokens, those that were computed again after a preemption included

    def step(self) -> bool:
        """Fills the queue, plans a step and commits the one before; whether requests still wait."""
        for group in itertools.islice(self._groups, max(0, QUEUE - self.scheduler.num_waiting)):
            self.scheduler.add(group)
            self.num_added += 1
        waiting = self.scheduler.num_waiting >= QUEUE // 2
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append(plan)
            self.num_computed += plan.num_tokens
        if len(self._in_flight) > 1 or plan is None:
            committed = self._in_flight.popleft()
            self.scheduler.commit(committed, [1] * len(committed.sampling))
        return waiting

    def count(self) -> tuple[int, int, int, int]:
        """Now: (allocated slots, written, reserved, running sequences)."""
        scheduler = self.scheduler
        written = int(scheduler.batch.position.sum())
        known = int(np.maximum(scheduler.batch.position, scheduler.batch.target).sum())
        return self.blocks.num_used * self.blocks.block_size, written, known - written, len(scheduler.running)


def measure(replay: Replay) -> dict[str, float]:
    samples = []
    blocks, saturated = replay.blocks, False
    while replay.step():
        allocated, written, reserved, running = replay.count()
        # Once the pool has been full it stays so: room that a finished request leaves is given away at once.
        saturated |= blocks.num_free <= max(blocks.watermark_blocks, blocks.allocator.num_usable // 50)
        if saturated:
            samples.append((allocated, written, reserved, running))
    blocks.check_invariants()
    if not samples:
        raise SystemExit("the pool never filled up: more --requests, please")
    allocated, written, reserved, running = np.array(samples, float).T
    slots = blocks.allocator.num_usable * blocks.block_size
    return {
        "block_size": blocks.block_size,
        "slots": slots,
        "requests": replay.num_added,
        "saturated_steps": len(samples),
        "waste": float(((allocated - written - reserved) / allocated).mean()),
        "waste_with_reserved": float(((allocated - written) / allocated).mean()),
        "pool_written": float((written / slots).mean()),
        "pool_allocated": float((allocated / slots).mean()),
        "mean_batch": float(running.mean()),
        "preemptions": replay.scheduler.num_preemptions,
        "computed_again": replay.scheduler.tokens_lost / replay.num_computed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path, help="CSV or CSV.gz: arrival_s,prompt_tokens,output_tokens")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--slots", type=int, default=15_728, help="token slots of the pool")
    parser.add_argument("--requests", type=int, default=5000, help="how many of the file; 0: all")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2560)
    parser.add_argument("--max-len", type=int, default=2048, help="context of the model")
    parser.add_argument("--watermark", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    lengths = read_lengths(arguments.lengths)
    result = measure(
        Replay(
            iter(lengths[: arguments.requests or None]),
            slots=arguments.slots,
            block_size=arguments.block_size,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_len=arguments.max_len,
            watermark=arguments.watermark,
        )
    )
    print(
        f"blocks of {result['block_size']}: {result['waste']:.2%} of the allocated slots hold no token "
        f"({result['waste_with_reserved']:.2%} counting prompt chunks that are still to be computed)"
    )
    print(
        f"the saturated pool: {result['pool_written']:.1%} hold tokens, "
        f"{result['pool_allocated']:.1%} are allocated; {result['mean_batch']:.1f} requests run together"
    )
    print(
        f"{result['saturated_steps']} steps of {result['requests']} requests, {result['preemptions']} preemptions, "
        f"{result['computed_again']:.1%} of the tokens computed a second time"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "pool_waste", "results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
