"""Runs jobs in a few processes and keeps their results in a file, so that tables and plots can be made again."""

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.paper import cost
from benchmarks.paper.scenario import Scenario, capacity, run


@dataclasses.dataclass(frozen=True)
class Job:
    scenario: Scenario
    search: bool = False
    """Look for the rate that can be taken, instead of running at the scenario's."""
    tolerance: float = 0.02


def execute(job: Job, folder: Path, beams: Path | None) -> dict[str, Any]:
    if job.search:
        return capacity(job.scenario, lambda s: run(s, folder, beams), tolerance=job.tolerance)
    return run(job.scenario, folder, beams)


class Store:
    """Results by job, in a JSON file. A change of the cost model makes them all unknown again.

    Args:
      path: the file; it need not exist.
      folder: where the traces lie.
      processes: how many jobs run at once.
      beams: a recording of beam searches; None: the synthetic model.
    """

    def __init__(self, path: Path, folder: Path, processes: int = 2, beams: Path | None = None) -> None:
        self.path, self.folder, self.processes, self.beams = path, folder, processes, beams
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        constants = repr((cost.MODELS, cost.VLLM_2023, cost.FASTER_TRANSFORMER, cost.PCIE_BANDWIDTH, cost.PCIE_COPY))
        self._model = hashlib.sha256(constants.encode()).hexdigest()[:12]
        self._recording = hashlib.sha256(beams.read_bytes()).hexdigest()[:12] if beams else "synthetic"

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return self._known[self._key(job)]

    def __contains__(self, job: Job) -> bool:
        return self._key(job) in self._known

    def _key(self, job: Job) -> str:
        recording = [self._recording] if job.scenario.beam else []
        return json.dumps([self._model, *recording, dataclasses.asdict(job)], sort_keys=True)

    def compute(self, jobs: Iterable[Job]) -> None:
        """Runs what is not known yet; says what it does."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self]
        start = time.monotonic()
        with concurrent.futures.ProcessPoolExecutor(self.processes) as pool:
            running = {pool.submit(execute, job, self.folder, self.beams): job for job in missing}
            for done, future in enumerate(concurrent.futures.as_completed(running), 1):
                job = running[future]
                self._known[self._key(job)] = result = future.result()
                self.path.write_text(json.dumps(self._known, indent=1) + "\n")
                s = job.scenario
                shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
                what = f"{s.model} {s.data} n={s.n} {s.system} block {s.block_size}"
                print(f"[{time.monotonic() - start:5.0f} s, {done}/{len(missing)}] {what}: {shown}", flush=True)
