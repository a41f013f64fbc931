"""jpaged bench: throughput, latency and start-up time. JSON fields are vLLM's where vLLM has them."""

import dataclasses
from typing import Annotated

from tyro import conf

from jpaged.cli.bench.latency import Latency
from jpaged.cli.bench.startup import Startup
from jpaged.cli.bench.throughput import Throughput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure throughput, latency or start-up time."""

    what: (
        Annotated[Throughput, conf.subcommand("throughput")]
        | Annotated[Latency, conf.subcommand("latency")]
        | Annotated[Startup, conf.subcommand("startup")]
    )

    def run(self) -> int:
        return self.what.run()
