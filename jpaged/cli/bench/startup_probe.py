"""The process that `jpaged bench startup` measures: a job on standard input, times on standard output.

Seconds count from `started_at`, when the parent asked for this process: Python and its imports are part of it.
"""

import json
import sys
import time

from jpaged.cli.bench.report import fixed_length
from jpaged.cli.session import CacheEvents
from jpaged.config import EngineConfig


def main() -> None:
    job = json.loads(sys.stdin.read())
    config = EngineConfig(**job["config"])
    from jpaged.engine import LLMEngine

    events = CacheEvents.get()
    engine = LLMEngine(config)
    ready = time.time() - job["started_at"]
    engine.add_request("0", {"prompt_token_ids": [1] * 32}, fixed_length(1))
    while engine.has_unfinished_requests():
        engine.step()
    print(json.dumps({"ready_time": ready, "first_token_time": time.time() - job["started_at"],
                      "num_compiled": events.misses, "num_loaded_from_cache": events.hits}))


if __name__ == "__main__":
    main()
