"""A scenario: one system, one model, one load; and the rate that it can take.

Scenarios are plain data, so that they run in other processes and their results can be kept (see `store.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper import traces
from benchmarks.paper.beam_traces import beam_trace
from benchmarks.paper.cost import FASTER_TRANSFORMER, MODELS, VLLM_2023, CostModel
from benchmarks.paper.memory_use import MemoryUse
from benchmarks.paper.simulate import simulate
from benchmarks.paper.systems import Settings, make_scheduler
from jpaged.scheduling.preemption import PreemptionMode

SWAP_BYTES = 20 * 2**30
"""Host memory for swapped blocks, for each GPU."""
THRESHOLD = 0.5
"""Seconds a token: where the rates of figures 12, 14, 16 and 17 are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    system: str
    model: str
    data: str
    """A data set of `traces.FILES`, or "chat"."""
    rate: float
    """Requests/s."""
    duration: float
    """Seconds of arrivals."""
    n: int = 1
    """Sequences of each request."""
    beam: bool = False
    block_size: int = 16
    preemption_mode: PreemptionMode = "auto"
    prefix: int = 0
    """Tokens that all prompts begin with."""
    window: tuple[float, float] | None = None
    """Seconds between which the pool is watched; the run ends with it."""
    seed: int = 0


def run(scenario: Scenario, folder: Path, beams: Path | None = None) -> dict[str, Any]:
    """Simulates a scenario with the traces of a folder; beam searches by a recording, or by the synthetic model."""
    model = MODELS[scenario.model]
    settings = Settings(
        slots=model.slots,
        block_size=scenario.block_size,
        ft_batch=model.ft_batch.get(scenario.data, 1),
        prefix_caching=scenario.prefix > 0,
        preemption_mode=scenario.preemption_mode,
        swap_slots=int(SWAP_BYTES * model.num_gpus / model.kv_bytes),
    )
    scheduler = make_scheduler(scenario.system, settings)
    software = FASTER_TRANSFORMER if scenario.system == "ft" else VLLM_2023
    use = MemoryUse(*scenario.window) if scenario.window else None
    outcome = simulate(
        scheduler,
        CostModel(model, software, block_size=scenario.block_size),
        traces.requests(_pairs(scenario, folder), scenario.rate, scenario.duration, scenario.seed),
        n=scenario.n,
        prefix=scenario.prefix,
        beams=beam_trace(scenario.n, beams) if scenario.beam else None,
        until=use.end if use else math.inf,
        observe=use,
    )
    return dataclasses.asdict(outcome) | (use.means() if use else {})


def _pairs(scenario: Scenario, folder: Path) -> np.ndarray:
    if scenario.data != "chat":
        return traces.load(folder, scenario.data)
    count = int(scenario.rate * scenario.duration * 1.2) + 100
    return traces.chat_pairs(traces.load(folder, "sharegpt"), count, scenario.seed)


def capacity(
    scenario: Scenario, evaluate: Callable[[Scenario], dict[str, Any]], *, tolerance: float = 0.02
) -> dict[str, Any]:
    """The rate at which normalized latency crosses `THRESHOLD`, by bisection.

    Args:
      scenario: its rate is where the search begins.
      evaluate: runs a scenario.
      tolerance: relative width of the last bracket; within it, log latency is taken as linear.

    Returns: {"capacity": requests/s, "points": [[rate, normalized latency], ...] by rate}
    """
    points: dict[float, float] = {}

    def exceeds(rate: float) -> bool:
        rate = float(f"{rate:.4g}")
        points[rate] = evaluate(dataclasses.replace(scenario, rate=rate))["normalized_latency"]
        return points[rate] > THRESHOLD

    low = high = scenario.rate
    if exceeds(low):
        low /= 1.2
        while exceeds(low):
            low, high = low / 1.2, low
    else:
        high *= 1.2
        while not exceeds(high):
            low, high = high, high * 1.2
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if exceeds(middle):
            high = middle
        else:
            low = middle
    for share in (0.5, 0.8):  # of no use to the search: the flat part of the curve
        exceeds(low * share)
    ordered = sorted(points.items())
    above = next(i for i, (_, latency) in enumerate(ordered) if latency > THRESHOLD)
    (r0, l0), (r1, l1) = ordered[above - 1], ordered[above]
    part = math.log(THRESHOLD / l0) / math.log(l1 / l0)
    return {"capacity": r0 + part * (r1 - r0), "points": ordered}
