"""Prometheus metrics: vLLM's names and buckets under the prefix `jpaged:`.

Gauges and running totals are read from the engine when somebody asks; histograms are fed on the engine's thread.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from jpaged.async_engine import AsyncLLM
from jpaged.outputs import RequestOutput
from jpaged.scheduling import StepPlan
from jpaged.sequence import Sequence, SequenceGroup
from jpaged.server.recent import Rates, Recent, Totals

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)


class Metrics:
    """Watches an engine.

    Args:
      llm: from now on it tells this object of its steps.
      model_name: the label of all metrics.
    """

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._llm, self._model = llm, model_name
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)  # type: ignore[arg-type]  # it has `collect`
        lengths = one_two_five(llm.engine.max_model_len)
        self._first_token = self._histogram("time_to_first_token_seconds", _FIRST_TOKEN)
        self._between = self._histogram("inter_token_latency_seconds", _BETWEEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", _REQUEST)
        self._queued = self._histogram("request_queue_time_seconds", _REQUEST)
        self._prefill = self._histogram("request_prefill_time_seconds", _REQUEST)
        self._decode = self._histogram("request_decode_time_seconds", _REQUEST)
        self._prompt_lengths = self._histogram("request_prompt_tokens", lengths)
        self._generated_lengths = self._histogram("request_generation_tokens", lengths)
        self._n = self._histogram("request_params_n", _N)
        self._step_tokens = self._histogram("iteration_tokens_total", _STEP)
        self.prompt_tokens = self.generation_tokens = self.cached_tokens = 0
        self._succeeded: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.on_end: Callable[[RequestOutput, int], None] = lambda output, generated: None
        """Called on the engine's thread with each request that has ended, and the tokens of all its samples."""
        self.recent = Recent(time.monotonic())
        self._last_token: dict[SequenceGroup, float] = {}
        self._groups: dict[str, SequenceGroup] = {}
        llm.engine.on_commit = self._take_step
        llm.on_outputs.append(self._take_outputs)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)

    @property
    def totals(self) -> Totals:
        return Totals(self.prompt_tokens, self.cached_tokens, self.generation_tokens)

    @property
    def ended(self) -> dict[str, int]:
        """Requests that have ended, by finish reason."""
        return dict(self._succeeded)

    def rates(self) -> Rates:
        """Of the last seconds."""
        return self.recent.rates(time.monotonic(), self.totals)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(
            f"jpaged:{name}", name.replace("_", " "), ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model)

    # ------------------------------------------------------------------------------------- the engine's thread

    def _take_step(self, plan: StepPlan, received: list[Sequence]) -> None:
        self._step_tokens.observe(sum(tile.length for tile in plan.tiles) + len(plan.rows))
        now = time.monotonic()
        groups: dict[SequenceGroup, int] = {}
        for sequence in received:
            groups[sequence.group] = groups.get(sequence.group, 0) + 1
        for group, count in groups.items():
            before = self._last_token.get(group)
            if before is None:
                self._groups[group.request_id] = group
                self.prompt_tokens += len(group.prompt_token_ids)
                self.cached_tokens += group.num_cached_tokens
                if group.metrics.time_to_first_token is not None:
                    self._first_token.observe(group.metrics.time_to_first_token)
                    self.recent.add_first_token(now, group.metrics.time_to_first_token)
            else:
                self._between.observe(now - before)
            self._last_token[group] = now
            if group.beams is None and group.readout.generates:
                self.generation_tokens += count
        self.recent.add(now, self.totals)

    def _take_outputs(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                self._take_end(output)

    def _take_end(self, output: RequestOutput) -> None:
        group = self._groups.pop(output.request_id, None)
        generated = 0
        if group is not None:
            del self._last_token[group]
            if group.readout.generates:
                generated = sum(sequence.num_output_tokens for sequence in group.sequences)
            if group.beams is not None:
                self.generation_tokens += generated
        self._prompt_lengths.observe(len(output.prompt_token_ids))
        self._generated_lengths.observe(generated)
        self.on_end(output, generated)
        self._n.observe(len(output.outputs))
        times = output.metrics
        if times.finished_time is not None:
            self._e2e.observe(times.finished_time - times.arrival_time)
            if times.first_scheduled_time is not None:
                self._queued.observe(times.first_scheduled_time - times.arrival_time)
                if times.first_token_time is not None:
                    self._prefill.observe(times.first_token_time - times.first_scheduled_time)
                    self._decode.observe(times.finished_time - times.first_token_time)
        reason = output.outputs[0].finish_reason
        if reason is not None:
            self._succeeded[reason] += 1

    # ---------------------------------------------------------------------------------------------- when asked

    def collect(self) -> Iterator[Any]:
        """Of prometheus_client's collectors."""
        engine = self._llm.engine
        scheduler, blocks = engine.scheduler, engine.blocks
        swap = scheduler.swap_space
        for name, value in (
            ("num_requests_running", len(scheduler.running)),
            ("num_requests_waiting", scheduler.num_waiting),
            ("num_requests_swapped", scheduler.num_swapped),
            ("kv_cache_usage_perc", blocks.num_used / blocks.allocator.num_usable),
            ("cpu_cache_usage_perc", swap.num_used / swap.capacity if swap.capacity else 0.0),
        ):
            yield self._family(GaugeMetricFamily, name, value)
        cached = blocks.cache is not None
        for name, value in (
            ("num_preemptions", scheduler.num_preemptions),
            ("prompt_tokens", self.prompt_tokens),
            ("generation_tokens", self.generation_tokens),
            ("prefix_cache_queries", self.prompt_tokens if cached else 0),
            ("prefix_cache_hits", self.cached_tokens),
            ("admission_rejections", self._llm.num_rejected),
            *self._speculation(),
        ):
            yield self._family(CounterMetricFamily, name, value)
        family = CounterMetricFamily(
            "jpaged:request_success", "requests that have ended", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._succeeded.items():
            family.add_metric([self._model, reason], count)
        yield family
        config = engine.config
        info = InfoMetricFamily("jpaged:cache_config", "of the KV cache", labels=[])
        info.add_metric(
            [],
            {
                "block_size": str(config.block_size),
                "num_gpu_blocks": str(blocks.allocator.num_usable),
                "num_cpu_blocks": str(swap.capacity),
                "enable_prefix_caching": str(config.enable_prefix_caching),
            },
        )
        yield info

    def _speculation(self) -> list[tuple[str, int]]:
        """Guessed tokens, if the engine guesses."""
        speculator = self._llm.engine.scheduler.speculator
        if speculator is None:
            return []
        return [
            ("spec_decode_num_draft_tokens", speculator.num_guessed),
            ("spec_decode_num_accepted_tokens", speculator.num_accepted),
        ]

    def _family(self, kind: Any, name: str, value: float) -> Any:
        family = kind(f"jpaged:{name}", name.replace("_", " "), labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    return tuple(m * 10**e for e in range(len(str(most))) for m in (1, 2, 5) if m * 10**e <= most)
