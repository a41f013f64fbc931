"""jpaged bench: a server under load, throughput, latency, start-up time. JSON fields are vLLM's where it has them."""

import dataclasses
from typing import Any

from jpaged.cli.bench.latency import Latency
from jpaged.cli.bench.serve import BenchServe
from jpaged.cli.bench.startup import Startup
from jpaged.cli.bench.throughput import Throughput
from jpaged.cli.flags import named

CHOICE: Any = (
    named(BenchServe, "serve") | named(Throughput, "throughput") | named(Latency, "latency") | named(Startup, "startup")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a server, throughput, latency or start-up time."""

    what: CHOICE
    """"""

    def run(self) -> int:
        return self.what.run()
