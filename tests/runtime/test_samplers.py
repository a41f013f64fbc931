"""Samplers are compiled beside the steps, and a wider one gives what the exact one gives."""

import asyncio
import dataclasses
import threading

import pytest

from jpaged import AsyncLLM, RequestOutputKind, SamplingParams
from jpaged.runtime.samplers import Samplers, request_variant
from jpaged.scheduling.plan import Variant
from tests.engine.support import run

KINDS = (
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(temperature=1, seed=3, max_tokens=6),
    SamplingParams(temperature=1, seed=3, top_p=0.8, frequency_penalty=1.0, max_tokens=6),
    SamplingParams(temperature=0, logprobs=2, min_tokens=3, max_tokens=6),
)


@pytest.fixture
def fresh(tiny, monkeypatch):
    """An engine that has forgotten its samplers; the steps themselves are compiled."""
    engine = tiny(enable_prefix_caching=False)
    kept = {key: value for key, value in engine.runner._compiled.items() if key[0] != "sample"}
    monkeypatch.setattr(engine.runner, "_compiled", kept)
    return engine


def compiled_for(engine, bucket) -> set[Variant]:
    return {key[2] for key in engine.runner._compiled if key[:2] == ("sample", bucket.num_results)}


def test_what_was_asked_for_together_is_covered(fresh):
    bucket = fresh.scheduler.buckets[0]
    samplers, kinds = Samplers(fresh.runner, [bucket]), [request_variant(params) for params in KINDS]
    for kind in kinds:
        assert samplers.covers(kind) == any(wider.covers(kind) for wider in compiled_for(fresh, bucket))
        samplers.prepare(kind).result()
        assert samplers.covers(kind)
    everything = Variant()
    for kind in kinds:
        everything = everything.union(kind)
    assert everything in compiled_for(fresh, bucket)
    assert len(compiled_for(fresh, bucket)) <= len(kinds), "not every combination"
    grammar = Variant(structured=True)
    assert not samplers.covers(grammar)
    samplers.prepare(grammar).result()
    assert samplers.covers(grammar.union(everything))
    samplers.close()


def test_a_wider_sampler_gives_the_same(tiny, fresh):
    wide = request_variant(KINDS[2]).union(request_variant(KINDS[3]))
    samplers = Samplers(fresh.runner, fresh.scheduler.buckets)
    samplers.prepare(wide).result()
    samplers._wishes.shutdown()
    fresh.runner.on_missing = lambda bucket, variant: None  # so that no step gets its own
    got, want = [], []
    for engine, results in ((fresh, got), (tiny(enable_prefix_caching=False), want)):
        if engine is not fresh:
            assert {key[2] for key in fresh.runner._compiled if key[0] == "sample"} == {wide}
            fresh.runner.on_missing = None
        for i, params in enumerate(KINDS):
            engine.add_request(str(i), {"prompt_token_ids": [5, 6, 7, 8 + i]}, params)
            [output] = run(engine).values()
            results.append(dataclasses.replace(output.outputs[0], weights_version=None))
    assert got == want
    samplers.close()


def test_no_step_compiles_a_sampler(fresh):
    """New kinds of requests come while others run: everything is compiled on other threads than the engine's."""
    fresh.config = dataclasses.replace(fresh.config, warmup=True)
    for bucket in fresh.scheduler.buckets:
        fresh.runner.compile_forward(bucket)
        for variant in (Variant(), Variant(sample=True)):
            fresh.runner.compile_sample(bucket, variant)
    threads = set()

    async def main():
        llm = AsyncLLM(engine=fresh)
        inner = fresh.runner.on_compile

        def noted(key):
            threads.add(threading.current_thread().name.partition("_")[0])
            return inner(key)

        fresh.runner.on_compile = noted

        async def ask(params):
            params = dataclasses.replace(params, max_tokens=30, output_kind=RequestOutputKind.FINAL_ONLY)
            async for _ in llm.generate({"prompt_token_ids": [9, 8, 7]}, params):
                pass

        await asyncio.gather(*(ask(KINDS[i % len(KINDS)]) for i in range(12)))
        await llm.shutdown()

    asyncio.run(main())
    assert threads == {"jpaged-compiler"}
