"""One part, in a process of its own: `python -m benchmarks.gpu.part NAME MODULE ARGUMENT FILE BUDGET [--dry-run]`."""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import timing
from pallas_kernels.dispatch import Unsupported


class Skipped(Exception):
    """This part or case cannot run here; says why. Not a failure."""


class Recorder:
    """Collects a part's rows, one a case, and writes them down after each.

    Attributes:
      dry_run: run tiny shapes: nothing is measured.
    """

    def __init__(self, name: str, path: Path, budget: float, dry_run: bool) -> None:
        self.dry_run, self._path, self._budget = dry_run, path, budget
        self._start = time.perf_counter()
        self._result: dict[str, Any] = {
            "part": name,
            "dry_run": dry_run,
            "environment": environment(),
            "rows": [],
            "left_out": 0,
            "complete": False,
            "seconds": None,
            "error": None,
        }
        self.write()

    def case(self, description: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Adds the row description | measure(). A case that raises is a row with an "error"; one that the budget has
        no time for is counted, and an empty row is returned."""
        if time.perf_counter() - self._start > self._budget:
            self._result["left_out"] += 1
            return {}
        try:
            row = description | measure()
        except (Skipped, Unsupported) as reason:
            row = description | {"skipped": str(reason)}
        except Exception as error:  # whatever a kernel or the compiler does: the next case may work
            row = description | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        self._result["rows"].append(row)
        self.write()
        return row

    def skip(self, reason: str) -> None:
        """The whole part cannot run here."""
        self._result["rows"].append({"skipped": reason})

    def finish(self, error: str | None) -> None:
        """The part has come to its end."""
        self._result |= {"complete": True, "error": error}
        self.write()

    def write(self) -> None:
        self._result["seconds"] = round(time.perf_counter() - self._start, 2)
        self._path.write_text(json.dumps(self._result, indent=1))


def environment() -> dict[str, Any]:
    """What a number is worth nothing without: device, driver, versions, date."""
    import jax

    device = jax.devices()[0]
    versions = {}
    for package in ("jax", "jaxlib", "flax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "driver": _driver(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("argument")
    parser.add_argument("path", type=Path)
    parser.add_argument("budget", type=float)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        timing.rehearse()
    recorder = Recorder(args.name, args.path, args.budget, args.dry_run)
    error = None
    try:
        importlib.import_module(args.module).run(recorder, args.argument)
    except Skipped as reason:
        recorder.skip(str(reason))
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
    recorder.finish(error)


if __name__ == "__main__":
    # As this module itself, not as __main__: parts raise `benchmarks.gpu.part.Skipped`.
    importlib.import_module("benchmarks.gpu.part").main()
