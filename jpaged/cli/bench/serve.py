"""jpaged bench serve: the latencies of a server under load, at one rate of requests or several."""

import asyncio
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jpaged
from jpaged.cli.bench.measures import METRICS, details, lines, parse_goodput, summarize
from jpaged.cli.bench.plot import check_plot, plot
from jpaged.cli.bench.report import Destination, check_counts
from jpaged.cli.bench.workloads import (
    Ask,
    arrivals_of,
    of_lengths,
    random_asks,
    read_prompts,
    read_trace,
    repeated_prefixes,
)
from jpaged.cli.flags import Switch
from jpaged.errors import EngineDeadError, InvalidConfigError
from jpaged.progress import Progress

if TYPE_CHECKING:
    import httpx2 as httpx

    from jpaged.cli.bench.client import Target, Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchServe:
    """Latencies of an OpenAI-compatible server under load.

    The server runs already, here or elsewhere. Requests are streamed, and times are those that this client sees.

    Example: jpaged bench serve --request-rate 1 2 4 --goodput ttft:500 tpot:100 --plot latency.png
    """

    base_url: str = "http://127.0.0.1:8000"
    """Where the server is."""
    backend: Literal["openai", "openai-chat"] = "openai"
    """Completions of token ids, or chats of random words."""
    endpoint: str | None = None
    """Path of the requests; None: /v1/completions or /v1/chat/completions."""
    model: str | None = None
    """Name of the model; None: the first that the server lists."""
    dataset_name: Literal["random", "sharegpt", "prefix-repetition", "custom", "trace"] = "random"
    """random: prompts of random tokens. sharegpt: with the lengths of a trace. trace: and with its arrivals.
    prefix-repetition: prompts that share beginnings. custom: the prompts of a file."""
    dataset_path: Path | None = None
    """sharegpt, trace: .csv or .csv.gz with columns arrival_s, prompt_tokens and output_tokens. custom: .jsonl with
    lines {"prompt": text, "output_tokens": 64}, where the second may be absent."""
    num_prompts: int = 100
    """Requests at each rate; of a file: how many of its first."""
    input_len: int = 128
    """Tokens of each prompt (with prefix-repetition: behind the prefix)."""
    output_len: int = 64
    """Most tokens of each answer."""
    random_range_ratio: float = 0.0
    """random: lengths are uniform in [length * (1 - ratio), length * (1 + ratio)]."""
    prefix_repetition_prefix_len: int = 256
    """Tokens of each shared beginning."""
    prefix_repetition_num_prefixes: int = 10
    """Different beginnings."""
    request_rate: tuple[tuple[float, ...], ...] = ()
    """Requests per second, or several rates to run one after the other; not given: all at once, or as a trace has them.
    A trace is stretched to a rate."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the intervals: 1 is a Poisson process, less comes in bursts, more evenly."""
    max_concurrency: int | None = None
    """Most requests under way; others wait, and their waiting is not counted."""
    num_warmups: int = 1
    """Requests before, which are not counted."""
    ignore_eos: Switch = False
    """Ask for answers of full length; not every server takes it."""
    temperature: float = 0.0
    """Of the sampling; 0 is greedy."""
    seed: int = 0
    """Of prompts and arrivals."""
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Which latencies to report."""
    metric_percentiles: str = "99"
    """Which percentiles, separated by commas."""
    goodput: tuple[tuple[str, ...], ...] = ()
    """Objectives KEY:MS with keys ttft, tpot, e2el; request_goodput counts the requests that meet all."""
    save_result: Switch = False
    """Write each rate's result, with the times of each request, to jpaged-RATEqps-MODEL-TIME.json."""
    plot: Path | None = None
    """Draw latencies against rates to this .png, .svg or .pdf file."""
    result: Destination = dataclasses.field(default_factory=Destination)
    """Where the result goes: an object, or a list of them if there are several rates."""

    def run(self) -> int:
        self.result.check()
        options = self._check()
        if self.plot is not None:
            check_plot(self.plot)
        results = asyncio.run(self._run(options))
        shown = [line for result in results for line in self._lines(result, options["metrics"])]
        self.result.give(results[0] if len(results) == 1 else results, shown)
        if self.plot is not None:
            plot(self.plot, results, options["metrics"])
        return 0

    def _check(self) -> dict[str, Any]:
        """What the reports need, from the flags."""
        check_counts(
            num_prompts=self.num_prompts,
            input_len=self.input_len,
            output_len=self.output_len,
            prefix_repetition_prefix_len=self.prefix_repetition_prefix_len,
            prefix_repetition_num_prefixes=self.prefix_repetition_num_prefixes,
            max_concurrency=1 if self.max_concurrency is None else self.max_concurrency,
        )
        metrics = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        if not metrics or not set(metrics) <= set(METRICS):
            raise InvalidConfigError(f"--percentile-metrics {self.percentile_metrics}: some of {', '.join(METRICS)}.")
        try:
            percentiles = [float(p) for p in self.metric_percentiles.split(",")]
        except ValueError:
            percentiles = [-1.0]
        if not all(0 <= p <= 100 for p in percentiles):
            raise InvalidConfigError(f"--metric-percentiles {self.metric_percentiles}: numbers from 0 to 100.")
        for name, value in (("burstiness", self.burstiness), *(("request-rate", rate) for rate in self._rates)):
            if not value > 0:
                raise InvalidConfigError(f"--{name} {value}: more than 0 is needed.")
        if not 0 <= self.random_range_ratio <= 1:
            raise InvalidConfigError(f"--random-range-ratio {self.random_range_ratio}: a number from 0 to 1.")
        objectives = parse_goodput([word for words in self.goodput for word in words])
        return {"metrics": metrics, "percentiles": percentiles, "objectives": objectives}

    @property
    def _rates(self) -> list[float]:
        return [rate for rates in self.request_rate for rate in rates] or [math.inf]

    # ---------------------------------------------------------------------------------------------------- running

    async def _run(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        from jpaged.cli.bench.client import first_model, run

        asks = self._asks()
        target = self._target({})
        async with target.client() as client:
            card = await first_model(client)
            model = self.model or card["id"]
            fields: dict[str, Any] = {"model": model, "temperature": self.temperature}
            target = self._target(fields | ({"ignore_eos": True} if self.ignore_eos else {}))
            fitting, skipped = _fitting(asks, card.get("max_model_len"))
            warm = fitting[: self.num_warmups]
            for timing in await run(client, target, warm, [0.0] * len(warm), max_concurrency=1) if warm else ():
                if timing.error is not None:
                    raise EngineDeadError(f"the first request failed, and nothing was measured: {timing.error}")
            results = []
            for rate in self._rates:
                timings = await self._at(rate, client, target, fitting)
                results.append(self._result(rate, model, skipped, timings, options))
        return results

    async def _at(self, rate: float, client: "httpx.AsyncClient", target: "Target", asks: list[Ask]) -> "list[Timing]":
        from jpaged.cli.bench.client import run

        arrivals = arrivals_of(asks, rate, self.burstiness, _random(self.seed + 1))
        label = "requests" if math.isinf(rate) else f"requests at {rate:g}/s"
        with Progress(label, total=len(asks)) as progress:
            return await run(
                client,
                target,
                asks,
                arrivals,
                max_concurrency=self.max_concurrency,
                on_done=lambda timing: progress.advance(),
            )

    def _target(self, fields: dict[str, Any]) -> "Target":
        from jpaged.cli.bench.client import Target

        chat = self.backend == "openai-chat"
        endpoint = self.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
        return Target(
            base_url=self.base_url,
            endpoint=endpoint,
            chat=chat,
            fields=fields,
            api_key=os.environ.get("OPENAI_API_KEY"),
        )

    def _asks(self) -> list[Ask]:
        text, random, count = self.backend == "openai-chat", _random(self.seed), self.num_prompts
        if self.dataset_name == "random":
            return random_asks(
                count, self.input_len, self.output_len, self.random_range_ratio, text=text, random=random
            )
        if self.dataset_name == "prefix-repetition":
            prefix_len, prefixes = self.prefix_repetition_prefix_len, self.prefix_repetition_num_prefixes
            return repeated_prefixes(
                count, prefix_len, self.input_len, prefixes, self.output_len, text=text, random=random
            )
        if self.dataset_path is None:
            raise InvalidConfigError(f"--dataset-name {self.dataset_name} needs --dataset-path.")
        if self.dataset_name == "custom":
            return read_prompts(self.dataset_path, count, self.output_len)
        asks = of_lengths(read_trace(self.dataset_path, count), text=text, random=random)
        lengths_only = self.dataset_name == "sharegpt"
        return [dataclasses.replace(ask, arrival=None) for ask in asks] if lengths_only else asks

    # ---------------------------------------------------------------------------------------------------- results

    def _result(
        self, rate: float, model: str, skipped: int, timings: "list[Timing]", options: dict[str, Any]
    ) -> dict[str, Any]:
        result = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "backend": self.backend,
            "jpaged_version": jpaged.__version__,
            "model_id": model,
            "dataset_name": self.dataset_name,
            "num_prompts": len(timings),
            "num_skipped": skipped,
            "request_rate": "inf" if math.isinf(rate) else rate,
            "burstiness": self.burstiness,
            "max_concurrency": self.max_concurrency,
            **summarize(timings, **options),
        }
        if self.save_result:
            name = f"jpaged-{rate:g}qps-{Path(model).name}-{result['date']}.json"
            Path(name).write_text(json.dumps(result | details(timings), indent=2) + "\n")
        errors = [t.error for t in timings if t.error is not None]
        if len(errors) == len(timings):
            raise EngineDeadError(f"every request failed: {errors[0]}")
        return result

    def _lines(self, result: dict[str, Any], metrics: list[str]) -> list[str]:
        rate = result["request_rate"]
        head = "All requests at once" if rate == "inf" else f"{rate:g} requests per second"
        head = "The trace's own arrivals" if rate == "inf" and self.dataset_name == "trace" else head
        skipped = [f"Requests left out as too long: {result['num_skipped']}"] if result["num_skipped"] else []
        return [f"-- {head}", *lines(result, metrics), *skipped]


def _fitting(asks: list[Ask], max_model_len: int | None) -> tuple[list[Ask], int]:
    """(the requests that fit into the model's context, as far as that is known; how many do not)."""
    most = max_model_len or math.inf
    fitting = [ask for ask in asks if isinstance(ask.prompt, str) or len(ask.prompt) + ask.output_len <= most]
    if not fitting:
        raise InvalidConfigError(f"no request fits into the model's {max_model_len} tokens.")
    return fitting, len(asks) - len(fitting)


def _random(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)
