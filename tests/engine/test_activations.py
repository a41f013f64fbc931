"""Captured activations are those of the training forward pass, however the tokens came to be computed."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpaged
from jpaged import SamplingParams
from jpaged.errors import InvalidConfigError, InvalidRequestError
from tests.engine.support import llm_of

SITES = ("residual", "attention", "mlp")


def greedy(count: int, **others) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **others)


def prompt(length: int, first: int) -> dict:
    return {"prompt_token_ids": [(first + 7 * i) % 300 + 3 for i in range(length)]}


def training(runner, tokens: list[int]) -> dict[str, np.ndarray]:
    """[T, layers, E] of each site, by the forward pass that has no pool."""
    _, state = runner.model.apply({"params": runner.params}, jnp.array([tokens]), mutable=["intermediates"])
    return {site: np.stack([layer[0] for layer in state["intermediates"][site]], axis=1) for site in SITES}


def check(runner, record, request, tokens: list[int], layers: list[int]) -> None:
    """All but the last token, which was sampled and never computed."""
    seen, wanted = record[request], training(runner, tokens)
    assert seen.positions.tolist() == list(range(len(tokens) - 1))
    for site in record.capture.sites:
        assert seen[site].dtype == np.float32
        np.testing.assert_allclose(seen[site], wanted[site][:-1, layers], atol=1e-4, rtol=0)


def test_chunks_batches_samples_and_a_warm_prefix_cache(tiny):
    """50 tokens in chunks beside other requests; the prompt is in the prefix cache, and is computed all the same."""
    llm = llm_of(tiny())
    long = prompt(50, 1)
    llm.generate(long, greedy(2))
    requests = [long, prompt(9, 2), prompt(30, 3)]
    samples = SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True, detokenize=False)
    with jpaged.capture(llm, [1, 0], SITES) as record:
        outputs = llm.generate(requests, [greedy(20), greedy(12), samples])
    for request, output in zip(requests, outputs, strict=True):
        for completion in output.outputs:
            tokens = request["prompt_token_ids"] + list(completion.token_ids)
            check(llm.engine.runner, record, (output.request_id, completion.index), tokens, [1, 0])
    assert record.request_ids == [output.request_id for output in outputs]


def test_preempted_requests_are_whole(tiny):
    engine = tiny(num_blocks=30)
    llm = llm_of(engine)
    requests = [prompt(30, i) for i in range(4)]
    with jpaged.capture(llm, [-1]) as record:
        outputs = llm.generate(requests, greedy(40))
    assert engine.scheduler.num_preemptions > 0
    for request, output in zip(requests, outputs, strict=True):
        tokens = request["prompt_token_ids"] + list(output.outputs[0].token_ids)
        check(engine.runner, record, output.request_id, tokens, [-1])


def test_costs_nothing_when_off(tiny):
    """The programs that ran before run again, before and after; none is compiled."""
    llm = llm_of(tiny())
    runner = llm.engine.runner
    before = llm.generate(prompt(20, 5), greedy(6))
    programs = dict(runner._compiled)
    with jpaged.capture(llm, [0]):
        captured = llm.generate(prompt(20, 5), greedy(6))
    others = {key for key in runner._compiled if key not in programs}
    assert all(key[0] == "forward" and key[-1] is not None and len(key) == 3 for key in others)
    llm.reset_prefix_cache()
    after = llm.generate(prompt(20, 5), greedy(6))
    assert {key: program for key, program in runner._compiled.items() if key not in others} == programs
    assert [o[0].outputs[0].token_ids for o in (captured, after)] == [before[0].outputs[0].token_ids] * 2


def test_what_can_not_be_captured_is_refused(tiny):
    llm = llm_of(tiny())
    for layers, sites in (([2], ("residual",)), ([], ("residual",)), ([0], ("keys",)), ([0], ())):
        with pytest.raises(InvalidConfigError), jpaged.capture(llm, layers, sites):
            pass
    with jpaged.capture(llm, [0]) as record:
        with pytest.raises(InvalidRequestError, match="beam search"):
            llm.beam_search(prompt(5, 1), jpaged.BeamSearchParams(beam_width=2, max_tokens=3))
        with pytest.raises(InvalidConfigError, match="captured from already"), jpaged.capture(llm, [0]):
            pass
    with pytest.raises(KeyError):
        record["nobody"]
    assert llm.generate(prompt(5, 1), greedy(2))[0].finished


def test_after_an_answer_that_ended_by_itself(tiny):
    """The engine was a step ahead then, and that step is for nobody: the engine is idle all the same."""
    llm = llm_of(tiny())
    [first] = llm.generate(prompt(20, 5), greedy(1))
    stop = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=list(first.outputs[0].token_ids))
    llm.generate(prompt(20, 5), stop)
    assert llm.engine.has_unfinished_requests(), "a step is in flight"
    with jpaged.capture(llm, [0]) as record:
        [output] = llm.generate(prompt(20, 7), greedy(4))
    check(
        llm.engine.runner,
        record,
        output.request_id,
        prompt(20, 7)["prompt_token_ids"] + output.outputs[0].token_ids,
        [0],
    )
