"""Engines that share one loaded model and one set of compiled steps.

Compiling and loading are what is slow. A runner is made once per model; a test gets an engine of its own around it,
with its own block manager and scheduler, so that it may have a small pool or a small token budget without a compile.
"""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

from jpaged.config import EngineConfig
from jpaged.engine import LLMEngine
from jpaged.llm import LLM
from jpaged.memory import BlockManager
from jpaged.scheduling import Scheduler
from jpaged.scheduling.ngrams import NgramSpeculator
from jpaged.scheduling.scheduler import PreemptionMode
from jpaged.startup import Components, build

GOLDENS = Path(__file__).parent.parent / "goldens"

EngineFactory = Callable[..., LLMEngine]


def engine_factory(config: EngineConfig) -> EngineFactory:
    """Builds once; then makes engines with: num_blocks, max_num_batched_tokens, enable_prefix_caching, policies."""
    parts = build(config)

    def make(
        num_blocks: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        scheduling_policy: str = "fcfs",
        seed: int = 0,
        swap_blocks: int = 0,
        preemption_mode: PreemptionMode = "auto",
        speculator: NgramSpeculator | None = None,
    ) -> LLMEngine:
        rows, width = parts.blocks.tables.shape
        total = parts.blocks.allocator.num_blocks
        assert num_blocks is None or num_blocks <= total, "the shared pool is smaller than that"
        blocks = BlockManager(
            num_blocks or total,
            config.block_size,
            rows,
            width // parts.blocks.num_groups,
            enable_prefix_caching=enable_prefix_caching,
            windows=parts.blocks.windows,
            max_chunk=parts.blocks.max_chunk,
        )
        scheduler = Scheduler(
            blocks,
            parts.scheduler.buckets,
            tile_size=parts.scheduler.tile_size,
            max_num_batched_tokens=max_num_batched_tokens or parts.scheduler.max_num_batched_tokens,
            swap_blocks=swap_blocks,
            preemption_mode=preemption_mode,
            speculator=speculator,
        )
        mine: Components = dataclasses.replace(parts, blocks=blocks, scheduler=scheduler)
        settings = dataclasses.replace(config, scheduling_policy=scheduling_policy, seed=seed)
        return LLMEngine(settings, components=mine)

    return make


def llm_of(engine: LLMEngine) -> LLM:
    """The offline API around an engine that is there."""
    llm = LLM.__new__(LLM)
    llm.engine, llm._next_id, llm._pinned = engine, 0, weakref.WeakSet()
    return llm


def run(engine: LLMEngine, *, check: bool = True, after_step: Callable[[int], None] | None = None) -> dict:
    """Steps until all is done; returns the finished outputs by request id."""
    finished = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        if check:
            engine.blocks.check_invariants()
        if after_step is not None:
            after_step(step)
        step += 1
    assert engine.blocks.num_used == 0, "blocks are held by nobody"
    return finished
