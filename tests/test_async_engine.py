"""AsyncLLM: many requests at once, readers of every kind, and an engine that fails."""

import asyncio
import gc
import threading
import time
from contextlib import aclosing

import jax
import pytest

from jpaged import SamplingParams
from jpaged.async_engine import AsyncLLM
from jpaged.config import EngineConfig
from jpaged.errors import EngineDeadError, InvalidConfigError, InvalidRequestError, QueueFullError
from jpaged.sampling_params import RequestOutputKind
from tests.engine.support import GOLDENS, engine_factory, run

DELTA = RequestOutputKind.DELTA
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind=DELTA)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, output_kind=DELTA)


def prompt_of(*tokens):
    return {"prompt_token_ids": list(tokens)}


@pytest.fixture
def make(tiny):
    """AsyncLLMs over the tiny model; at the end no block is held."""
    made = []

    def of(engine=None, **arguments) -> AsyncLLM:
        llm = AsyncLLM(engine=engine or tiny(), **arguments)
        made.append(llm)
        return llm

    yield of
    for llm in made:
        llm.close()
        if llm.failure is None:
            assert llm.engine.blocks.num_used == 0
            llm.engine.blocks.check_invariants()


async def collect(outputs):
    """(text, token ids) of a request's first sequence, from its deltas."""
    text, tokens = "", []
    async for output in outputs:
        text, tokens = text + output.outputs[0].text, tokens + output.outputs[0].token_ids
    return text, tokens


def offline(engine, prompts, params):
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params[i])
    finished = run(engine)
    return [finished[str(i)].outputs[0] for i in range(len(prompts))]


def test_concurrent_streams_equal_the_offline_engine(make, tiny):
    prompts = ["Once upon a time", *(prompt_of(*range(3, 5 + i)) for i in range(19))]
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=5 + 3 * i, output_kind=DELTA) for i in range(20)]
    want = offline(tiny(), prompts, [SamplingParams(temperature=0.9, seed=i, max_tokens=5 + 3 * i) for i in range(20)])
    llm = make()

    async def main():
        return await asyncio.gather(*(collect(llm.generate(*each)) for each in zip(prompts, params, strict=True)))

    assert asyncio.run(main()) == [(output.text, output.token_ids) for output in want]


def test_text_of_a_real_model(smollm2):
    llm = AsyncLLM(engine=smollm2())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text, _ = asyncio.run(collect(llm.generate(chat, SamplingParams(temperature=0, max_tokens=16, output_kind=DELTA))))
    assert "Paris" in text
    llm.close()


def test_a_slow_reader_gets_one_merged_output_and_holds_nobody_up(make):
    # B runs beside A, whose bits are compared.
    exact = engine_factory(
        EngineConfig(
            model=str(GOLDENS / "models" / "llama"),
            batch_invariant=True,
            max_num_seqs=8,
            max_model_len=256,
            num_gpu_blocks_override=64,
            max_num_batched_tokens=72,
            warmup=False,
        )
    )
    params = [SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logprobs=1)]
    [want] = offline(exact(), ["A"], params)
    llm = make(exact())

    async def main():
        slow = await llm.submit("A", SamplingParams(**{**vars(LONG), "logprobs": 1}))
        first = await anext(slow)
        while llm.num_unfinished_requests:  # the engine gets to the end without the reader
            await collect(llm.generate("B", GREEDY))
        rest = [output async for output in slow]
        assert len(rest) == 1, "all that was not taken lies in one output"
        parts = [first.outputs[0], rest[0].outputs[0]]
        assert "".join(part.text for part in parts) == want.text
        assert [t for part in parts for t in part.token_ids] == want.token_ids
        assert [at for part in parts for at in part.logprobs] == want.logprobs
        assert parts[1].finish_reason == "length"

    asyncio.run(main())


def test_leaving_a_stream_aborts_its_request(make):
    llm = make()

    async def main():
        async with aclosing(llm.generate("A", LONG)) as outputs:
            async for _ in outputs:
                break
        task = asyncio.create_task(collect(llm.generate("B", LONG)))
        while not llm.num_unfinished_requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await llm.call(lambda engine: engine.num_unfinished_requests) == 0
        assert llm.num_unfinished_requests == 0

    asyncio.run(main())


def test_cancelling_at_any_moment_leaves_nothing_behind(make):
    """Also before the engine's thread has heard of the request."""
    llm = make()

    async def main():
        await llm.pause()
        for turns in range(12):
            task = asyncio.create_task(llm.submit("A", LONG))
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:  # it was accepted already
                (await task).close()
        await llm.resume()
        assert await llm.call(lambda engine: engine.num_unfinished_requests) == 0

    asyncio.run(main())


def test_abort_tells_the_reader(make):
    llm = make()

    async def main():
        stream = await llm.submit("A", LONG, "mine")
        await anext(stream)
        await llm.pause()  # an abort is answered while nothing is computed, too
        await llm.abort(["mine", "unknown"])
        *_, last = [output async for output in stream]
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
        await llm.resume()

    asyncio.run(main())


def test_pause_and_resume(make):
    llm = make()

    async def main():
        await llm.pause()
        stream = await llm.submit("A", GREEDY)
        steps = await llm.call(lambda engine: engine.times.steps)
        for _ in range(5):
            assert await llm.call(lambda engine: engine.times.steps) == steps
        assert llm.is_healthy, "a pause is not a fault"
        await llm.resume()
        assert len((await collect(stream))[1]) == 24

    asyncio.run(main())


def test_bad_requests_are_told_and_touch_nobody(make):
    llm = make()

    async def main():
        await llm.pause()
        stream = await llm.submit("A", GREEDY, "one")
        for prompt in ("", prompt_of(1 << 20), prompt_of(*range(3, 300)), 7):
            with pytest.raises(InvalidRequestError):
                await llm.submit(prompt, GREEDY)
        with pytest.raises(InvalidRequestError, match="in use"):
            await llm.submit("B", GREEDY, "one")
        await llm.resume()
        assert len((await collect(stream))[1]) == 24

    asyncio.run(main())


def test_the_queue_is_bounded_in_requests_and_in_tokens(make):
    async def main():
        llm = make(max_num_queued_reqs=3)
        await llm.pause()
        streams = [await llm.submit("A", GREEDY) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests"):
            await llm.submit("A", GREEDY)
        await llm.resume()
        await asyncio.gather(*map(collect, streams))
        assert llm.num_rejected == 1

        llm = make(max_num_queued_tokens=10)
        await llm.pause()
        first = await llm.submit(prompt_of(*range(3, 15)), GREEDY)  # alone it may be longer than the limit
        with pytest.raises(QueueFullError, match="12 prompt tokens"):
            await llm.submit(prompt_of(3), GREEDY)
        await llm.resume()
        await collect(first)
        await collect(llm.generate(prompt_of(3), GREEDY))
        assert await llm.call(lambda engine: engine.scheduler.num_waiting_tokens) == 0

    asyncio.run(main())


def test_a_failed_step_fails_all_and_is_remembered(make, monkeypatch):
    llm = make()
    deaths = []
    llm.on_death = deaths.append

    async def main():
        streams = [await llm.submit("A", LONG) for _ in range(3)]
        for stream in streams:
            await anext(stream)

        def broken(plan):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(llm.engine.runner, "forward", broken)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await collect(stream)
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await llm.submit("A", LONG)

    asyncio.run(main())
    assert not llm.is_healthy
    assert len(deaths) == 1


def test_a_stuck_step_is_found_by_the_watchdog(make, monkeypatch):
    llm = make(step_timeout=0.2)
    go_on = threading.Event()
    forward = llm.engine.runner.forward

    def stuck(plan):
        go_on.wait()
        return forward(plan)

    async def main():
        monkeypatch.setattr(llm.engine.runner, "forward", stuck)
        assert llm.is_healthy
        with pytest.raises(EngineDeadError, match="stuck"):
            await collect(llm.generate("A", LONG))
        assert not llm.is_healthy

    asyncio.run(main())
    go_on.set()
    llm.close()


def test_compiling_is_not_being_stuck(make):
    llm = make(step_timeout=0.2)
    compiling, go_on = threading.Event(), threading.Event()

    def long_compile(engine):
        with engine.runner.on_compile(("forward",)):
            compiling.set()
            go_on.wait()

    async def main():
        call = asyncio.create_task(llm.call(long_compile))
        await asyncio.to_thread(compiling.wait)
        end = time.monotonic() + 0.5  # longer than the watchdog's patience
        while time.monotonic() < end:
            assert llm.is_healthy
            await asyncio.sleep(0.05)
        go_on.set()
        await call
        assert len((await collect(llm.generate("A", GREEDY)))[1]) == 24

    asyncio.run(main())


def test_shutdown_drains_and_aborts_what_is_left(make):
    async def main():
        llm = make()
        stream = await llm.submit("A", LONG)
        await llm.shutdown(drain=60)
        assert len((await collect(stream))[1]) == 200

        llm = make()
        stream = await llm.submit("A", LONG)
        await anext(stream)
        await llm.pause()
        await llm.shutdown(drain=0)
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason == "abort"
        with pytest.raises(EngineDeadError, match="shut down"):
            await llm.submit("A", LONG)

    asyncio.run(main())


def test_an_event_loop_that_goes_away_takes_its_requests_along(make):
    llm = make()

    async def leave():
        await llm.submit("A", LONG)

    asyncio.run(leave())

    async def main():
        while await llm.call(lambda engine: engine.num_unfinished_requests):
            await asyncio.sleep(0)

    asyncio.run(main())


def remains():
    gc.collect()
    return [o for o in gc.get_objects() if type(o).__name__ in ("Stream", "SequenceGroup")]


def test_many_requests_leave_nothing_behind(make):
    llm, earlier = make(), remains()
    others = set(map(id, earlier))  # of other tests, kept until the end so that no id is used again

    async def main():
        async def one(i):
            async with aclosing(llm.generate(prompt_of(3 + i % 50), GREEDY)) as outputs:
                async for _ in outputs:
                    if i % 3 == 0:
                        break

        for _ in range(4):
            await asyncio.gather(*(one(i) for i in range(50)))
        await llm.call(lambda engine: None)
        assert [o for o in remains() if id(o) not in others] == []

    asyncio.run(main())


@pytest.fixture
def weights(tiny):
    """The shared runner's own, which it gets back, and others."""
    runner = tiny().runner
    old = runner.params
    yield old, jax.tree.map(lambda leaf: leaf * 1.5, old)
    runner.params = old


def test_updated_weights_are_served_from_the_next_step_on(make, tiny, weights):
    """The tokens that a stream has stay; those that follow are the new weights' alone."""
    engine = tiny(enable_prefix_caching=False)
    [before] = offline(engine, [prompt_of(3, 4, 5)], [SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)])
    llm, asked = make(tiny(enable_prefix_caching=False)), threading.Event()
    # The fifth token waits for the update to be asked for, and the engine with it.
    llm.on_outputs.append(lambda outputs: any(len(o.outputs[0].token_ids) == 5 for o in outputs) and asked.wait(60))

    async def main():
        stream = await llm.submit(prompt_of(3, 4, 5), LONG)
        tokens = (await anext(stream)).outputs[0].token_ids
        while len(tokens) < 4:
            tokens += (await anext(stream)).outputs[0].token_ids
        update = asyncio.create_task(llm.update_weights(weights[1]))
        await asyncio.sleep(0)
        asked.set()
        assert await update == 1
        tokens += (await collect(stream))[1]
        await llm.pause()
        aborted = await llm.submit("B", LONG)
        assert await llm.update_weights(weights[0], in_flight="abort") == 2
        [last] = [output async for output in aborted if output.finished]
        assert last.outputs[0].finish_reason == "abort"
        with pytest.raises(InvalidConfigError, match="in_flight"):
            await llm.update_weights(weights[0], in_flight="later")
        return tokens

    got = asyncio.run(main())
    common = next(i for i, (a, b) in enumerate(zip(got, before.token_ids, strict=True)) if a != b)
    assert common >= 5
    engine.update_weights(weights[1])
    rest = SamplingParams(temperature=0, max_tokens=200 - common, ignore_eos=True)
    [after] = offline(engine, [prompt_of(3, 4, 5, *got[:common])], [rest])
    assert got[common:] == after.token_ids
