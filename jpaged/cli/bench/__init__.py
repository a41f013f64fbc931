"""jpaged bench: throughput, latency and start-up time. JSON fields are vLLM's where vLLM has them."""

import dataclasses
from typing import Any

from jpaged.cli.bench.latency import Latency
from jpaged.cli.bench.startup import Startup
from jpaged.cli.bench.throughput import Throughput
from jpaged.cli.flags import named

CHOICE: Any = named(Throughput, "throughput") | named(Latency, "latency") | named(Startup, "startup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure throughput, latency or start-up time."""

    what: CHOICE
    """"""

    def run(self) -> int:
        return self.what.run()
