"""Who continues whom: the beams of simulated searches.

What a beam search shares depends on the model's probabilities. `RecordedBeams` replays searches of a real model;
`SyntheticBeams` invents probabilities, and what comes of it is labelled so.
"""

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from jpaged.scheduling.beams import Candidates
from jpaged.scheduling.plan import StepPlan


class BeamTrace(Protocol):
    def candidates(self, plan: StepPlan) -> Candidates:
        """Continuations of each of a plan's beam groups, best first; none of their tokens ends a beam."""
        ...


def beam_trace(width: int, recording: Path | None) -> BeamTrace:
    return RecordedBeams(recording, width) if recording else SyntheticBeams(width)


class SyntheticBeams:
    """SYNTHETIC: every beam's best tokens have probabilities from a stick broken at random, v ~ Beta(1, 0.6): the first
    takes v, the next v of the rest, and so on; in the mean the best has 0.62. No model stands behind it."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.width = width
        self._rng = np.random.default_rng(seed)

    def candidates(self, plan: StepPlan) -> Candidates:
        width, groups = self.width, len(plan.beams)
        scores = np.stack([group.beams.scores for group, _ in plan.beams])
        parts = self._rng.beta(1, 0.6, (groups, width, width)).clip(1e-6, 1 - 1e-6)
        rest = np.log1p(-parts).cumsum(axis=2) - np.log1p(-parts)
        offered = (scores[:, :, None] + np.log(parts) + rest).reshape(groups, -1)
        best = np.argsort(-offered, axis=1)[:, : 2 * width]
        return Candidates(
            np.take_along_axis(offered, best, axis=1).astype(np.float32), best // width, np.zeros_like(best)
        )


class RecordedBeams:
    """Parents of real searches: request i takes recording i modulo their number, again from its second step if it is
    longer.

    Args:
      path: JSON, a list of {"width": w, "requests": [[[w parents' ranks], ... one list a step], ... one a request]}.
    """

    def __init__(self, path: Path, width: int) -> None:
        recordings = json.loads(path.read_text())
        found = [r["requests"] for r in recordings if r["width"] == width]
        if not found:
            raise ValueError(f"{path} has no beam searches of width {width}")
        self.width = width
        self._parents = [np.array(steps, np.int64) for steps in found[0]]

    def candidates(self, plan: StepPlan) -> Candidates:
        parents = np.stack([self._next(int(group.request_id), group.beams.num_generated) for group, _ in plan.beams])
        parents = np.tile(parents, (1, 2))  # twice as many as are kept
        return Candidates(np.zeros(parents.shape, np.float32), parents, np.zeros_like(parents))

    def _next(self, number: int, step: int) -> np.ndarray:
        parents = self._parents[number % len(self._parents)]
        return parents[step if step < len(parents) else 1 + (step - 1) % (len(parents) - 1)]
