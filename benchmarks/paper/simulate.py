"""A discrete-event simulation: real schedulers and block managers, a modelled device.

    arrivals -> Scheduler.schedule -> StepPlan -> CostModel.step: the clock advances -> Scheduler.commit -> latencies

Steps run one after the other, as in the paper's engine: the next one is planned when the tokens of the last are known.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.paper.beam_traces import BeamTrace
from benchmarks.paper.cost import CostModel
from benchmarks.paper.systems import make_group, work_of
from benchmarks.paper.traces import Request
from jpaged.scheduling import Scheduler

Observer = Callable[[float, Scheduler], None]
"""Called with the time and the scheduler when a step has been planned."""


@dataclasses.dataclass
class Outcome:
    """What came of a run."""

    normalized_latency: float
    """Mean over the finished requests of (finish - arrival) / output tokens; seconds a token."""
    finished: int
    seconds: float
    """Simulated, until the last request ended."""
    steps: int
    mean_batch: float
    """Running requests, mean over the steps."""
    preemptions: int
    swaps: int
    """Groups swapped out."""
    tokens_computed_again: int


def simulate(
    scheduler: Scheduler,
    cost: CostModel,
    requests: Iterator[Request],
    *,
    n: int = 1,
    prefix: int = 0,
    beams: BeamTrace | None = None,
    until: float = float("inf"),
    observe: Observer | None = None,
) -> Outcome:
    """Runs requests until all have ended, or until a time.

    Args:
      requests: by arrival.
      n: sequences of every request.
      prefix: tokens in front of every prompt, the same for all.
      beams: who continues whom; requests are beam searches of width n then.
      until: seconds after which no further step is planned.
      observe: looks at the scheduler after each planned step.
    """
    now, steps, running, latencies = 0.0, 0, 0, []
    arrivals = enumerate(requests)
    coming = next(arrivals, None)
    while now < until:
        while coming is not None and coming[1].arrival <= now:
            scheduler.add(make_group(coming[1], coming[0], n=n, prefix=prefix, beam=beams is not None))
            coming = next(arrivals, None)
        plan = scheduler.schedule()
        if plan is None:
            if coming is None:
                break
            now = coming[1].arrival
            continue
        steps += 1
        running += len(scheduler.running)
        if observe is not None:
            observe(now, scheduler)
        now += cost.step(work_of(plan))
        before = scheduler.running.copy()
        tokens = np.zeros((len(plan.sampling), 1), np.int32)
        scheduler.commit(plan, tokens, beams.candidates(plan) if beams and plan.beams else None)
        if len(scheduler.running) < len(before):
            ended = [group for group in before if group.finished]
            latencies += [(now - g.metrics.arrival_time) / g.params.max_tokens for g in ended]
    return Outcome(
        normalized_latency=sum(latencies) / max(1, len(latencies)),
        finished=len(latencies),
        seconds=now,
        steps=steps,
        mean_batch=running / max(1, steps),
        preemptions=scheduler.num_preemptions,
        swaps=scheduler.num_swaps_out,
        tokens_computed_again=scheduler.tokens_lost,
    )
