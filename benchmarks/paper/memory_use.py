"""What the pool's slots hold, step by step, and the mean of it: figures 2, 13 and 15.

tokens     K and V of tokens computed
reserved   for tokens that the sequence will have (its true length is known here)
internal   for tokens that it was expected to have and will not: the estimate's excess
the rest   rounding up to chunks or blocks, and what is free
"""

import numpy as np

from benchmarks.paper.baselines import ReservingBlockManager
from jpaged.scheduling import Scheduler


class MemoryUse:
    """An observer of a simulation, between two times in seconds."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end
        self._samples: list[tuple[float, ...]] = []

    def __call__(self, now: float, scheduler: Scheduler) -> None:
        if not self.start <= now < self.end:
            return
        blocks = scheduler.blocks
        slots = blocks.allocator.num_usable * blocks.block_size
        tokens = int(scheduler.batch.position.sum())
        reserved = internal = 0
        if isinstance(blocks, ReservingBlockManager):
            rows = np.flatnonzero(blocks.counts)
            final = int(scheduler.batch.end[rows].sum()) + len(rows)
            reserved = final - tokens
            internal = int(blocks.reserved_tokens.sum()) - final
        logical, physical = int(blocks.counts.sum()), blocks.num_used
        batch = len(scheduler.running)
        self._samples.append((batch, tokens / slots, reserved / slots, internal / slots, logical, max(1, physical)))

    def means(self) -> dict[str, float]:
        """Over the steps of the window. Shares of the pool; `saved`: 1 - 1 / mean(table entries / blocks)."""
        batch, tokens, reserved, internal, logical, physical = np.array(self._samples, float).T
        return {
            "watched_steps": len(batch),
            "batch": float(batch.mean()),
            "tokens": float(tokens.mean()),
            "reserved": float(reserved.mean()),
            "internal": float(internal.mean()),
            "saved": float(1 - 1 / (logical / physical).mean()),
        }
