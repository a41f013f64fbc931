"""The systems that are compared, by name, and requests for them: what the simulation takes from the engine's insides.

jpaged        jpaged's own scheduler and block manager, with the settings of the paper's vLLM
orca-oracle, orca-pow2, orca-max, ft     see baselines.py
"""

import dataclasses

from benchmarks.paper.baselines import (
    FasterTransformerScheduler,
    OrcaScheduler,
    ReservingBlockManager,
    reserve_max,
    reserve_oracle,
    reserve_pow2,
)
from benchmarks.paper.cost import Work
from benchmarks.paper.traces import Request
from jpaged.memory import BlockManager
from jpaged.outputs import RequestMetrics
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling import Bucket, Scheduler, StepPlan, beams
from jpaged.scheduling.plan import make_buckets
from jpaged.scheduling.preemption import PreemptionMode
from jpaged.sequence import Sequence, SequenceGroup

SYSTEMS = ("ft", "orca-max", "orca-pow2", "orca-oracle", "jpaged")
ESTIMATES = {"orca-max": reserve_max, "orca-pow2": reserve_pow2, "orca-oracle": reserve_oracle}
WATERMARK = 0.01
MAX_NUM_BATCHED_TOKENS = 2560
TILE_SIZE = 32
"""Prompts are cut where the token budget of a step ends; the paper's vLLM makes them wait for the next step."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a system is built with."""

    slots: int
    """Token slots of the pool."""
    block_size: int = 16
    max_len: int = 2048
    ft_batch: int = 1
    """Sequences of FasterTransformer's batch."""
    prefix_caching: bool = False
    preemption_mode: PreemptionMode = "auto"
    swap_slots: int = 0
    """Token slots in host memory."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step may be: of the runner that executes it, or of the simulated one."""

    max_rows: int
    tile_size: int
    max_num_batched_tokens: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def simulated(cls, slots: int) -> "Shapes":
        """The paper's limits, over a pool of so many slots."""
        rows = min(2048, slots // 16)
        buckets = make_buckets(rows, MAX_NUM_BATCHED_TOKENS // TILE_SIZE, TILE_SIZE)
        return cls(rows, TILE_SIZE, MAX_NUM_BATCHED_TOKENS, buckets)


def make_scheduler(name: str, settings: Settings, shapes: Shapes | None = None) -> Scheduler:
    """A system over an empty pool, for the simulation or for a runner of some shapes."""
    size, longest = settings.block_size, settings.max_len
    num_blocks = settings.slots // size + 1
    shapes = shapes or Shapes.simulated(settings.slots)
    max_rows = shapes.max_rows
    blocks: BlockManager
    if name == "jpaged":
        blocks = BlockManager(
            num_blocks,
            size,
            max_rows,
            -(-longest // size),
            watermark=WATERMARK,
            enable_prefix_caching=settings.prefix_caching,
        )
    else:
        blocks = ReservingBlockManager(num_blocks, size, max_rows, longest)
    arguments = {
        "blocks": blocks,
        "buckets": shapes.buckets,
        "tile_size": shapes.tile_size,
        "max_num_batched_tokens": shapes.max_num_batched_tokens,
    }
    if name == "jpaged":
        swap_blocks = settings.swap_slots // size
        return Scheduler(**arguments, swap_blocks=swap_blocks, preemption_mode=settings.preemption_mode)
    if name == "ft":
        return FasterTransformerScheduler(**arguments, longest=longest, max_batch=settings.ft_batch)
    return OrcaScheduler(**arguments, longest=longest, estimate=ESTIMATES[name])


def make_group(request: Request, number: int, *, n: int = 1, beam: bool = False, prefix: int = 0) -> SequenceGroup:
    """A request with tokens of its own behind `prefix` tokens that all requests have in common."""
    first = 1 + number * 4096  # no two requests have a token in common
    tokens = [*range(-prefix, 0), *range(first, first + request.prompt)]
    params = SamplingParams(
        n=n, max_tokens=request.output, ignore_eos=True, use_beam_search=beam, temperature=0.0 if beam else 1.0
    )
    group = SequenceGroup(
        f"{number}", None, tokens, params, number, (0, number), RequestMetrics(arrival_time=request.arrival)
    )
    length = len(tokens) + request.output
    group.sequences = [Sequence(group, i, list(tokens), length) for i in range(n)]
    if beam:
        group.beams = beams.new_search(group)
    return group


def work_of(plan: StepPlan) -> Work:
    """What a step costs."""
    tiles = plan.tiles
    prompt = sum(t.length for t in tiles)
    pairs = sum(t.length * (t.start + t.length / 2) for t in tiles)
    decodes = len(plan.rows)
    moved = sum(len(s.blocks) for s in plan.swaps_out) + sum(len(s.blocks) for s in plan.swaps_in)
    return Work(
        decodes=decodes,
        context=int(plan.positions.sum()) + decodes,
        prompt=prompt,
        pairs=pairs,
        samples=len(plan.sampling),
        groups=len({id(s.group) for s in plan.sampling}),
        copied=len(plan.copies),
        swapped=moved,
    )
