"""The process that `jpaged bench startup` measures: a job on standard input, times on standard output.

Seconds count from `started_at`, when the parent asked for this process: Python and its imports are in them.
"""

import json
import sys
import time

from checkpoints.errors import CheckpointError
from jpaged.cli.bench.report import fixed_length
from jpaged.cli.session import CacheEvents
from jpaged.config import EngineConfig
from jpaged.errors import JpagedError


def main() -> None:
    job = json.loads(sys.stdin.read())
    config = EngineConfig(**job["config"])
    from jpaged.engine import LLMEngine

    events = CacheEvents.get()
    try:
        engine = LLMEngine(config)
    except (JpagedError, CheckpointError) as error:
        sys.exit(" ".join(str(error).split()))
    ready = time.time() - job["started_at"]
    engine.add_request("0", {"prompt_token_ids": [1] * 32}, fixed_length(1))
    while engine.has_unfinished_requests():
        engine.step()
    print(
        json.dumps(
            {
                "ready_time": ready,
                "first_token_time": time.time() - job["started_at"],
                "num_compiled": events.misses,
                "num_loaded_from_cache": events.hits,
            }
        )
    )


if __name__ == "__main__":
    main()
