"""Opening an engine for a command, with reports of what is loaded and what is compiled."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jpaged.cli.status import Status
from jpaged.config import EngineConfig

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.sampling_params import SamplingParams


class CompileReport:
    """Tells of each program that the runner compiles; one line sums up when the first answer comes."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self.tile_size = 0  # of the engine, once there is one
        self._misses = CacheEvents.get().misses
        self._count, self._seconds = 0, 0.0

    @contextlib.contextmanager
    def __call__(self, key: tuple) -> Iterator[None]:
        start, misses = time.monotonic(), CacheEvents.get().misses
        with self._status.doing(f"compiling {describe(key, self.tile_size)}") as remarks:
            yield
            if CacheEvents.get().misses == misses:
                remarks.append("from the cache")
        self._count += 1
        self._seconds += time.monotonic() - start

    def settle(self) -> None:
        """Leaves a line on a terminal, where the ticking ones are gone, if anything was really compiled."""
        misses = CacheEvents.get().misses
        if self._count and misses > self._misses and self._status.on_terminal and not self._status.muted:
            self._status.line(
                f"compiled {self._count} programs in {self._seconds:.1f} s; the next start finds them in the cache"
            )
        self._misses, self._count, self._seconds = misses, 0, 0.0


class CacheEvents:
    """Counts what JAX's persistent compilation cache had and what was compiled, in this process."""

    _only: "CacheEvents | None" = None

    def __init__(self) -> None:
        self.hits = self.misses = 0

    @classmethod
    def get(cls) -> "CacheEvents":
        if cls._only is None:
            import jax

            cls._only = cls()
            jax.monitoring.register_event_listener(cls._only._take)
        return cls._only

    def _take(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"


def describe(key: tuple, tile_size: int) -> str:
    """What the runner compiles under this key, in words."""
    match key:
        case ("forward", bucket):
            rows = f"{bucket.decode_rows} row{'s' if bucket.decode_rows > 1 else ''}"
            prompts = f" + {bucket.prefill_tiles * tile_size} prompt tokens" if bucket.prefill_tiles else ""
            return f"a step for {rows}{prompts}"
        case ("sample", count, _):
            return f"the sampler for {count} row{'s' if count > 1 else ''}"
        case ("pool", _):
            return "embeddings"
    return "prompt log-probabilities"


def open_engine(config: EngineConfig, status: Status) -> "tuple[LLMEngine, CompileReport]":
    """Loads the model. Without `config.warmup`, steps are compiled and reported when first needed."""
    with status.doing("starting JAX"):
        import jax

        from jpaged.engine import LLMEngine

        jax.devices()
    report = CompileReport(status)
    # On a terminal the engine shows bars of its own.
    quiet = (
        contextlib.nullcontext()
        if status.on_terminal
        else status.doing(f"loading {config.model}" + (" and compiling its steps" if config.warmup else ""))
    )
    with quiet:
        engine = LLMEngine(config)
    report.tile_size, engine.runner.on_compile = engine.runner.tile_size, report
    return engine, report


def compile_decode_steps(engine: "LLMEngine", params: "SamplingParams") -> None:
    """Compiles the steps for every number of running requests down to one, for requests with these parameters.

    As requests finish, the batch shrinks from one size to the next: otherwise the answers would halt at each.
    """
    from jpaged.scheduling.plan import sampling_variant

    for bucket in engine.scheduler.buckets:
        if not bucket.prefill_tiles:
            engine.runner.compile_forward(bucket)
            engine.runner.compile_sample(bucket, sampling_variant(params))
