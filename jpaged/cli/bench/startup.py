"""jpaged bench startup: from the start of a process to a ready engine and to its first token, cold and warm.

Cold starts have an empty compilation cache, warm ones the cache that the last cold start left.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from jpaged.cli.bench.report import Destination, check_counts, environment, percentiles
from jpaged.cli.flags import build, flags_of
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import EngineDeadError

EngineFlags = flags_of(EngineConfig, "StartupEngine", leave_out=("compilation_cache_dir",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Startup:
    """Seconds until a fresh process has a ready engine, and a first token.

    Cold: with an empty compilation cache. Warm: with a full one.

    Ready: weights loaded and, but for --no-warmup, every step compiled.
    """

    num_iters_cold: int = 1
    """Starts with an empty compilation cache."""
    num_iters_warm: int = 3
    """Starts with a full one."""
    result: Destination = dataclasses.field(default_factory=Destination)
    """Where the result goes."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""

    def run(self) -> int:
        self.result.check()
        check_counts(num_iters_cold=self.num_iters_cold, num_iters_warm=self.num_iters_warm)
        config = build(EngineConfig, self.engine)
        status = Status()
        cold, warm = [], []
        for i in range(self.num_iters_cold):
            # Kept until the warm starts are through with it.
            cache = tempfile.TemporaryDirectory(prefix="jpaged-bench-")
            with status.doing(f"cold start {i + 1} of {self.num_iters_cold}"):
                cold.append(start_once(dataclasses.replace(config, compilation_cache_dir=cache.name)))
        with cache:
            for i in range(self.num_iters_warm):
                with status.doing(f"warm start {i + 1} of {self.num_iters_warm}"):
                    warm.append(start_once(dataclasses.replace(config, compilation_cache_dir=cache.name)))
        result = _summary("cold", cold) | _summary("warm", warm) | environment(config.model)
        self.result.give(result, _lines("cold", result) + _lines("warm", result))
        return 0


def start_once(config: EngineConfig) -> dict[str, Any]:
    """Starts an engine in a process of its own; what `startup_probe` prints.

    Raises:
      EngineDeadError: it did not start. The message says what the process said last.
    """
    job = json.dumps({"config": dataclasses.asdict(config), "started_at": time.time()})
    command = [sys.executable, "-m", "jpaged.cli.bench.startup_probe"]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)  # noqa: S603  # ourselves
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EngineDeadError(f"the engine did not start: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(kind: str, starts: list[dict[str, Any]]) -> dict[str, Any]:
    times = [s["ready_time"] for s in starts]
    first = [s["first_token_time"] for s in starts]
    return {
        f"avg_{kind}_startup_time": sum(times) / len(times),
        f"{kind}_startup_times": times,
        f"{kind}_startup_percentiles": percentiles(times),
        f"avg_{kind}_first_token_time": sum(first) / len(first),
        f"{kind}_first_token_times": first,
        f"{kind}_num_compiled": [s["num_compiled"] for s in starts],
        f"{kind}_num_loaded_from_cache": [s["num_loaded_from_cache"] for s in starts],
    }


def _lines(kind: str, result: dict[str, Any]) -> list[str]:
    ready, first = result[f"avg_{kind}_startup_time"], result[f"avg_{kind}_first_token_time"]
    compiled, loaded = result[f"{kind}_num_compiled"][-1], result[f"{kind}_num_loaded_from_cache"][-1]
    return [
        f"{kind.capitalize()} start: ready after {ready:.2f} s, first token after {first:.2f} s "
        f"({compiled} programs compiled, {loaded} loaded from the cache)"
    ]
