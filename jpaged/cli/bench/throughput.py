"""jpaged bench throughput: all requests at once, as fast as they go."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpaged.cli.bench.report import (
    Destination,
    check_counts,
    check_lengths,
    environment,
    fixed_length,
    random_prompts,
)
from jpaged.cli.bench.workloads import read_trace
from jpaged.cli.flags import build, flags_of
from jpaged.cli.session import open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.outputs import RequestOutput
    from jpaged.tokenization import TokensPrompt

EngineFlags = flags_of(
    EngineConfig,
    "ThroughputEngine",
    defaults={"warmup": False},
    helps={"warmup": "Compile every step shape before; False: run all requests once before the measured run."},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Requests and tokens per second of many requests.

    All are there from the beginning, prompts are random tokens.

    Every answer has exactly the wanted length. A first run is not measured.
    """

    num_prompts: int = 64
    """Requests; of a trace: how many of its first rows."""
    input_len: int = 128
    """Tokens of each prompt."""
    output_len: int = 64
    """Tokens of each answer."""
    dataset_path: Path | None = None
    """A trace to take the lengths from: .csv or .csv.gz with columns arrival_s (not looked at), prompt_tokens
    and output_tokens. Rows that do not fit into the model's context are left out and counted."""
    result: Destination = dataclasses.field(default_factory=Destination)
    """Where the result goes."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""

    def run(self) -> int:
        self.result.check()
        check_counts(num_prompts=self.num_prompts, input_len=self.input_len, output_len=self.output_len)
        lengths = [(self.input_len, self.output_len)] * self.num_prompts
        if self.dataset_path is not None:
            lengths = [row[1:] for row in read_trace(self.dataset_path, self.num_prompts)]
        config = build(EngineConfig, self.engine)
        status = Status()
        engine, _ = open_engine(config, status)
        if self.dataset_path is None:
            check_lengths(engine, self.input_len, self.output_len)
        fitting = [(p, o) for p, o in lengths if p + o <= engine.max_model_len]
        if not fitting:
            raise InvalidConfigError(f"{self.dataset_path}: no row fits into {engine.max_model_len} tokens.")
        prompts = random_prompts([p for p, _ in fitting], engine.model_config.vocab_size, config.seed)
        output_lens = [o for _, o in fitting]
        if not config.warmup:
            _run(engine, prompts, output_lens)  # the same requests make the same steps: all are compiled then
            engine.blocks.reset_prefix_cache()
        with status.doing(f"running {len(prompts)} requests"):
            start = time.perf_counter()
            outputs = _run(engine, prompts, output_lens)
            elapsed = time.perf_counter() - start
        skipped = {"num_skipped": len(lengths) - len(fitting)}
        result = _result(outputs, elapsed) | skipped | environment(config.model)
        self.result.give(result, _lines(result))
        return 0


def _run(engine: "LLMEngine", prompts: list["TokensPrompt"], output_lens: list[int]) -> list["RequestOutput"]:
    for i, (prompt, output_len) in enumerate(zip(prompts, output_lens, strict=True)):
        engine.add_request(str(i), prompt, fixed_length(output_len))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def _result(outputs: list["RequestOutput"], elapsed: float) -> dict[str, Any]:
    inputs = sum(len(o.prompt_token_ids) for o in outputs)
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    ttfts = [t for o in outputs if (t := o.metrics.time_to_first_token) is not None]
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": inputs + generated,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (inputs + generated) / elapsed,
        "total_input_tokens": inputs,
        "total_output_tokens": generated,
        "output_tokens_per_second": generated / elapsed,
        "mean_ttft_ms": 1000 * sum(ttfts) / len(ttfts),
        "num_preemptions": sum(o.metrics.num_preemptions for o in outputs),
    }


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Requests:                {result['num_requests']} in {result['elapsed_time']:.2f} s",
        f"Requests per second:     {result['requests_per_second']:.2f}",
        f"Output tokens per second: {result['output_tokens_per_second']:.1f}",
        f"Total tokens per second: {result['tokens_per_second']:.1f} "
        f"({result['total_input_tokens']} in, {result['total_output_tokens']} out)",
        f"Mean time to first token: {result['mean_ttft_ms']:.0f} ms",
    ]
    if result["num_skipped"]:
        lines.append(f"Rows left out as too long: {result['num_skipped']}")
    return lines
