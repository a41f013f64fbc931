"""Samplers that are compiled before a step needs them, so that no request holds up the others.

A step's sampler does what the requests in it ask for, all together: so many combinations that they can't all be
compiled at start. But a sampler that does more than is asked for gives the same tokens. So before the first request of
a new kind is taken, one is compiled that does all that was ever asked for, and what its steps lack until their own are
compiled is speed. All of that happens on other threads than the engine's.
"""

import concurrent.futures
from collections.abc import Iterable

from jpaged.runtime.runner import Runner
from jpaged.sampling_params import SamplingParams
from jpaged.scheduling.plan import Bucket, Variant, logprob_width, sampling_variant


def request_variant(params: SamplingParams) -> Variant:
    """What a request will ask of the samplers of its steps; beams, which depend on more than that, aside."""
    variant = sampling_variant(params)
    if params.prompt_logprobs is None:
        return variant
    return variant.union(Variant(num_logprobs=logprob_width(params.prompt_logprobs)))


class Samplers:
    """Has a runner's samplers compiled in time. Thread-safe.

    Args:
      runner: from now on its steps take wider samplers rather than compile their own.
      buckets: of the steps.
      ready: what is compiled for all buckets already.
    """

    def __init__(self, runner: Runner, buckets: Iterable[Bucket], ready: Iterable[Variant] = ()) -> None:
        self._runner = runner
        self._buckets = list({bucket.num_results: bucket for bucket in buckets}.values())
        self._ready = set(ready)
        self._wished: set[tuple[int, Variant]] = set()
        # Nobody waits for a wish, so that none may stand before what somebody waits for.
        self._urgent = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jpaged-compiler")
        self._wishes = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jpaged-compiler")
        runner.on_missing = self._wish

    def covers(self, variant: Variant) -> bool:
        """Whether a request of this kind can run, beside all those before it, without a compile in a step."""
        return any(wider.structured == variant.structured and wider.covers(variant) for wider in self._ready.copy())

    def prepare(self, variant: Variant) -> concurrent.futures.Future[None]:
        """Has compiled what is missing for that, which may take seconds."""
        return self._urgent.submit(self._prepare, variant)

    def close(self) -> None:
        """Leaves undone what has not begun."""
        self._runner.on_missing = None
        for pool in (self._urgent, self._wishes):
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, variant: Variant) -> None:
        if self.covers(variant):
            return
        everything = variant
        for other in self._ready:
            everything = everything.union(other)
        # Grammars change the order of a step (`LLMEngine._launch`): steps without one must not take that one.
        wanted = dict.fromkeys((everything, everything._replace(structured=False)))
        for one in wanted:
            for bucket in self._buckets:
                self._runner.compile_sample(bucket, one)
        self._ready |= set(wanted)

    def _wish(self, bucket: Bucket, variant: Variant) -> None:
        """A step has taken a wider one."""
        if (bucket.num_results, variant) not in self._wished:
            self._wished.add((bucket.num_results, variant))
            self._wishes.submit(self._runner.compile_sample, bucket, variant)
