"""Runs the parts, each in a process of its own, and ends with a table.

    benchmarks/gpu/run.sh                                  all parts, in ten minutes; --minutes N for more cases
    benchmarks/gpu/run.sh --part bandwidth --part step     those whose names begin so
    benchmarks/gpu/run.sh --part my.module:argument        a part of one's own: run(recorder, argument)
    benchmarks/gpu/run.sh --dry-run                        tiny shapes on CPU: whether everything runs at all

The time is dealt out by the parts' shares, the most telling parts first; what a part leaves goes to those after it, and
cases that are left without time are counted. A part leaves OUTPUT/PART.json, written after every case. A part that is
complete is not run again unless --again is given, so that a run that was cut short goes on. A part that fails, dies or
hangs is reported, and the rest goes on. It ends with OUTPUT/table.md and, where matplotlib is installed, plots.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import plots
from benchmarks.gpu.report import complaints, markdown


class Part(NamedTuple):
    """A module under `benchmarks.gpu` and what its `run` is told."""

    module: str
    argument: str
    share: int
    """Of the time, about in seconds of ten minutes; when it is up, no further case is begun."""
    memory: float = 0.92
    """Of the GPU, which JAX takes at once."""


PARTS = {
    "correctness-triton": Part("benchmarks.gpu.correctness", "triton", 50),
    "tune": Part("benchmarks.gpu.tune", "", 60),
    "bandwidth-triton": Part("benchmarks.gpu.bandwidth", "triton", 60),
    "step-llama": Part("benchmarks.gpu.step", "llama-3-8b", 45),
    "prefill": Part("benchmarks.gpu.prefill", "", 50),
    "engine": Part("benchmarks.gpu.engine", "", 80),
    "memory": Part("benchmarks.gpu.memory", "", 20),
    "compare-jpaged": Part("benchmarks.gpu.compare", "jpaged", 10),
    "compare-jax": Part("benchmarks.gpu.compare", "jax", 15),
    "compare-torch": Part("benchmarks.gpu.compare", "torch", 10, memory=0.2),
    "compare-flashinfer": Part("benchmarks.gpu.compare", "flashinfer", 20, memory=0.2),
    "correctness-mosaic": Part("benchmarks.gpu.correctness", "mosaic", 25),
    "bandwidth-mosaic": Part("benchmarks.gpu.bandwidth", "mosaic", 25),
    "correctness-jax_triton": Part("benchmarks.gpu.correctness", "jax_triton", 20),
    "bandwidth-jax_triton": Part("benchmarks.gpu.bandwidth", "jax_triton", 25),
    "step-opt": Part("benchmarks.gpu.step", "opt-13b", 40),
    "correctness-xla": Part("benchmarks.gpu.correctness", "xla", 30),
    "bandwidth-xla": Part("benchmarks.gpu.bandwidth", "xla", 15),
}
GRACE = 120  # seconds that a part may take beyond its budget: starting, and the case that it has begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="name, beginning of names, or module:argument")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--again", action="store_true", help="run parts that are complete already")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU; nothing in it is a measurement")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = choose(args.part)
    paths = {name: args.output / f"{name}.json" for name in chosen}
    waiting = {n: part for n, part in chosen.items() if args.again or not is_complete(paths[n], args.dry_run)}
    end, shares = time.monotonic() + 60 * args.minutes, sum(part.share for part in waiting.values())
    for name, part in waiting.items():
        budget = max(end - time.monotonic(), 0.0) * part.share / shares
        shares -= part.share
        print(f"{name}: {budget:.0f} s", file=sys.stderr, flush=True)
        run_part(name, part, budget, paths[name], args.dry_run)
    results = {name: json.loads(path.read_text()) for name, path in paths.items()}
    table = markdown(results)
    drawn = plots.draw(results, args.output)
    table += "".join(f"![{path.stem}]({path.name})\n" for path in drawn)
    (args.output / "table.md").write_text(table)
    print(table)
    wrong = [f"{name}: {text}" for name, result in results.items() for text in complaints(result)]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def choose(asked: list[str] | None) -> dict[str, Part]:
    """The parts asked for, by name.

    Raises:
      SystemExit: there is no such part.
    """
    if not asked:
        return PARTS
    chosen = {}
    for name in asked:
        found = {key: part for key, part in PARTS.items() if key.startswith(name)}
        if ":" in name:
            module, _, argument = name.partition(":")
            found = {f"{module.rpartition('.')[2]}-{argument}": Part(module, argument, 60)}
        if not found:
            raise SystemExit(f"no part {name!r}: take one of {', '.join(PARTS)}, or module:argument")
        chosen |= found
    return chosen


def is_complete(path: Path, dry_run: bool) -> bool:
    """Whether the part has run to its end, for good or as a rehearsal, as is wanted now."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return result["complete"] and result["error"] is None and result["dry_run"] == dry_run


def run_part(name: str, part: Part, budget: float, path: Path, dry_run: bool) -> None:
    """Runs a part to its end or to its death; afterwards there is a JSON file that says which."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, part.module, part.argument, str(path)]
    command += [str(budget)] + (["--dry-run"] if dry_run else [])
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(part.memory)} | os.environ
    if dry_run:
        environment |= {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"  # compiles sooner
    try:
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=budget + GRACE)
        error, tail = f"ended with exit status {done.returncode}", done.stderr
    except subprocess.TimeoutExpired as expired:
        error = f"stopped after {budget + GRACE:.0f} seconds"
        tail = expired.stderr.decode(errors="replace") if isinstance(expired.stderr, bytes) else expired.stderr or ""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        result = {"part": name, "dry_run": dry_run, "environment": {}, "rows": [], "left_out": 0, "error": None}
        result |= {"complete": False, "seconds": None}
    if not result["complete"] and result["error"] is None:
        last = tail.strip().splitlines()[-1:] or [""]
        result["error"] = f"{error}: {last[0][:300]}"
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
