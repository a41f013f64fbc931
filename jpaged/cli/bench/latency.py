"""jpaged bench latency: the time of one batch from its first prompt token to its last output token."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from jpaged.cli.bench.report import (
    Destination,
    check_counts,
    check_lengths,
    environment,
    fixed_length,
    percentiles,
    random_prompts,
)
from jpaged.cli.flags import build, flags_of
from jpaged.cli.session import open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.tokenization import TokensPrompt

# The same prompts come again and again: with the prefix cache only the first time would be measured.
EngineFlags = flags_of(
    EngineConfig,
    "LatencyEngine",
    defaults={"warmup": False, "enable_prefix_caching": False},
    helps={"max_num_seqs": "Most sequences running at once; None: the batch size."},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds that one batch takes from prompts to finished answers.

    Steps are compiled during the warm-up iterations, so there must be one.
    """

    batch_size: int = 1
    """Requests at once."""
    input_len: int = 32
    """Tokens of each prompt."""
    output_len: int = 128
    """Tokens of each answer."""
    num_iters_warmup: int = 1
    """Iterations before the measured ones."""
    num_iters: int = 5
    """Measured iterations."""
    result: Destination = dataclasses.field(default_factory=Destination)
    """Where the result goes."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""

    def run(self) -> int:
        self.result.check()
        check_counts(
            batch_size=self.batch_size,
            input_len=self.input_len,
            output_len=self.output_len,
            num_iters_warmup=self.num_iters_warmup,
            num_iters=self.num_iters,
        )
        wanted: Any = self.engine
        rows = self.batch_size if wanted.max_num_seqs is None else wanted.max_num_seqs
        config = build(EngineConfig, wanted, max_num_seqs=rows)
        if rows < self.batch_size:
            raise InvalidConfigError(f"--max-num-seqs {rows} is below --batch-size {self.batch_size}.")
        status = Status()
        engine, _ = open_engine(config, status)
        check_lengths(engine, self.input_len, self.output_len)
        vocab_size = engine.model_config.vocab_size
        prompts = random_prompts([self.input_len] * self.batch_size, vocab_size, config.seed)
        for i in range(self.num_iters_warmup):
            if i:
                with status.doing(f"warm-up iteration {i + 1} of {self.num_iters_warmup}"):
                    _iteration(engine, prompts, self.output_len)
            else:
                _iteration(engine, prompts, self.output_len)  # compiles, and reports that itself
        latencies = []
        for i in range(self.num_iters):
            with status.doing(f"iteration {i + 1} of {self.num_iters}"):
                latencies.append(_iteration(engine, prompts, self.output_len))
        result: dict[str, Any] = {
            "avg_latency": sum(latencies) / len(latencies),
            "latencies": latencies,
            "percentiles": percentiles(latencies),
            "batch_size": self.batch_size,
            "input_len": self.input_len,
            "output_len": self.output_len,
        } | environment(config.model)
        self.result.give(
            result,
            [f"Average latency: {result['avg_latency']:.3f} s"]
            + [f"{p} % percentile: {value:.3f} s" for p, value in result["percentiles"].items()],
        )
        return 0


def _iteration(engine: "LLMEngine", prompts: list["TokensPrompt"], output_len: int) -> float:
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, fixed_length(output_len))
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - start
