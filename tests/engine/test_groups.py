"""Requests of several sequences: what they draw, what they share, what they cost; and that nothing of the batch, the
cache or the pool ever shows in their tokens."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jpaged import SamplingParams
from jpaged.errors import InvalidRequestError
from tests.engine.support import GOLDENS, run

BLOCK = 4  # of the `tiny` engines


def prompt_of(length, first=5):
    return [first + (7 * i) % 370 for i in range(length)]


def add(engine, request_id, prompt, params):
    engine.add_request(request_id, {"prompt_token_ids": prompt}, params)


def tokens_of(output):
    return [completion.token_ids for completion in output.outputs]


# ------------------------------------------------------------------------------------------------- same keys

EIGHT = SamplingParams(n=8, seed=77, temperature=1.0, max_tokens=24, ignore_eos=True)


def add_with_key(engine, request_id, prompt, params, index):
    """A request of one sequence that draws with the counter keys (seed, index, position)."""
    add(engine, request_id, prompt, dataclasses.replace(params, n=1))
    engine._groups[request_id].sequences[0].index = index


@pytest.fixture(scope="session")
def eight_requests(tiny):
    """The outputs of eight requests, one after the other, with the keys of eight samples of `prompt_of(21)`."""
    outputs = []
    for index in range(8):
        engine = tiny(enable_prefix_caching=False)
        add_with_key(engine, "x", prompt_of(21), EIGHT, index)
        outputs += tokens_of(run(engine)["x"])
    assert len(set(map(tuple, outputs))) == 8
    return outputs


def test_eight_samples_are_eight_requests_with_the_same_keys(tiny, eight_requests):
    engine = tiny()
    add(engine, "n", prompt_of(21), EIGHT)
    output = run(engine)["n"]
    assert [o.index for o in output.outputs] == list(range(8))
    assert tokens_of(output) == eight_requests
    assert engine.blocks.num_copies == 7


def test_eight_requests_at_once_in_any_order(tiny, eight_requests):
    engine = tiny()
    for index in (3, 7, 0, 1, 6, 2, 5, 4):
        add_with_key(engine, f"{index}", prompt_of(21), EIGHT, index)
    finished = run(engine)
    assert [tokens_of(finished[f"{i}"])[0] for i in range(8)] == eight_requests


@pytest.mark.parametrize("n", [2, 3, 5])
def test_fewer_samples_are_the_first_ones(tiny, eight_requests, n):
    """And in a mixed batch, whose other members come and go."""
    engine = tiny()
    add(engine, "greedy", prompt_of(30, 9), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    add(engine, "n", prompt_of(21), dataclasses.replace(EIGHT, n=n))
    add(engine, "other", prompt_of(21), SamplingParams(seed=1, n=2, top_k=5, max_tokens=15, ignore_eos=True))
    add(engine, "beams", prompt_of(13), SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=12))
    assert tokens_of(run(engine)["n"]) == eight_requests[:n]


PRESSURE = {
    "swap": {"swap_blocks": 200, "preemption_mode": "swap"},
    "auto": {"swap_blocks": 200},
    "recompute": {"preemption_mode": "recompute"},
    "little host room": {"swap_blocks": 18},
}


@pytest.mark.parametrize("mode", PRESSURE)
def test_samples_under_pressure(tiny, eight_requests, mode):
    """A pool that holds one group to its end, and two for a while; what is drawn does not change."""
    engine = tiny(num_blocks=36, scheduling_policy="priority", enable_prefix_caching=False, **PRESSURE[mode])
    for name in "abc":
        params = dataclasses.replace(EIGHT, n=4)
        engine.add_request(name, {"prompt_token_ids": prompt_of(21)}, params, priority=1)

    def add_another(step):
        if step % 5 == 0 and step < 60:
            add(engine, f"{step}", prompt_of(20, step), SamplingParams(max_tokens=10, ignore_eos=True))

    finished = run(engine, after_step=add_another)
    assert [tokens_of(finished[name]) for name in "abc"] == [eight_requests[:4]] * 3
    scheduler = engine.scheduler
    preemptions = sum(finished[name].metrics.num_preemptions for name in "abc")
    assert preemptions >= 2
    assert scheduler.num_swaps_in == scheduler.num_swaps_out
    if mode == "little host room":
        assert 0 < scheduler.num_swaps_out < preemptions
    else:
        assert (scheduler.num_swaps_out >= preemptions) == (mode != "recompute")


# ------------------------------------------------------------------------------------------------- blocks in use


def blocks_for(tokens):
    return -(-tokens // BLOCK)


def blocks_by_formula(prompt, computed, n):
    """Blocks of n sequences with a common prompt: its full blocks once, all others once a sequence.

    Before anyone has written after the prompt, its partial block is shared as well.
    """
    shared = prompt // BLOCK if computed > prompt else blocks_for(prompt)
    return shared + n * (blocks_for(computed) - shared)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 20, 21, 23])
def test_blocks_in_use_are_those_of_the_formula(tiny, length, n, caching):
    """At every step, from the fork to the end; the partial block is copied for all but the last of the sharers."""
    engine = tiny(enable_prefix_caching=caching)
    add(engine, "n", prompt_of(length), dataclasses.replace(EIGHT, n=n, max_tokens=14))
    seen = []

    def look(step):
        if engine.blocks.num_used:
            assert (engine.blocks.counts > 0).sum() == n
            seen.append((engine.blocks.num_used, engine.blocks.num_copies))

    run(engine, after_step=look)
    partial = length % BLOCK != 0
    expected = [(blocks_by_formula(length, length + k, n), (n - 1) * partial * (k > 0)) for k in range(14)]
    assert seen[: len(expected)] == expected


def test_samples_that_end_give_back_only_what_is_their_own(tiny):
    """Shared blocks stay for the others; with the last sample everything is free."""
    engine = tiny(enable_prefix_caching=False)
    add(engine, "n", prompt_of(22), dataclasses.replace(EIGHT, n=3))
    for _ in range(4):
        engine.step()
    group = engine._groups["n"]
    assert engine.blocks.num_used == blocks_by_formula(22, 25, 3) == 5 + 3 * 2
    for left, sequence in zip((2, 1), group.sequences, strict=False):
        engine._stop(sequence, "text")
        assert engine.blocks.num_used == 5 + left * 2
        engine.blocks.check_invariants()
    assert [o.finish_reason for o in run(engine)["n"].outputs] == ["stop", "stop", "length"]


def test_a_prompt_is_computed_once_for_all_samples(tiny):
    engine = tiny(max_num_batched_tokens=24, enable_prefix_caching=False)
    add(engine, "n", prompt_of(60), dataclasses.replace(EIGHT, n=6, max_tokens=3))
    tokens = []
    while engine.has_unfinished_requests():
        engine.step()
        if engine._in_flight:
            tokens.append(engine._in_flight[-1].plan.num_tokens)
    assert tokens[:4] == [16, 16, 16, 12]
    assert tokens[4] == 6


# ------------------------------------------------------------------------------------------------------ best_of


def test_best_of_returns_the_most_likely_samples(tiny):
    params = dataclasses.replace(EIGHT, n=8, logprobs=0)
    engine = tiny()
    add(engine, "all", prompt_of(21), params)
    everything = run(engine)["all"].outputs
    for completion in everything:
        chosen = [at[token].logprob for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-5)
    ranked = sorted(everything, key=lambda o: -o.cumulative_logprob)
    for n in (1, 3, 7):
        for logprobs in (None, 2):
            engine = tiny()
            add(engine, "best", prompt_of(21), dataclasses.replace(EIGHT, n=n, best_of=8, logprobs=logprobs))
            best = run(engine)["best"].outputs
            assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:n]]
            assert [o.cumulative_logprob for o in best] == pytest.approx([o.cumulative_logprob for o in ranked[:n]])
            assert [o.index for o in best] == list(range(n))
            assert all((o.logprobs is None) == (logprobs is None) for o in best)


def test_best_of_does_not_stream_what_may_not_be_returned(tiny):
    engine = tiny()
    add(engine, "best", prompt_of(21), dataclasses.replace(EIGHT, n=1, best_of=3))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.finished for output in outputs] == [True]


# --------------------------------------------------------------------------------------------------- ends, scores


def test_samples_end_each_at_its_own_stop(tiny, eight_requests):
    """Stop tokens and stop strings taken from two of the samples: they end there, the others where they must."""
    token = eight_requests[2][5]
    engine = tiny()
    add(engine, "token", prompt_of(21), dataclasses.replace(EIGHT, stop_token_ids=[token]))
    for completion, free in zip(run(engine)["token"].outputs, eight_requests, strict=True):
        if token in free:
            assert completion.token_ids == free[: free.index(token) + 1]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
        else:
            assert (completion.token_ids, completion.finish_reason) == (free, "length")
    add(engine, "free", prompt_of(21), EIGHT)
    texts = [o.text for o in run(engine)["free"].outputs]
    stop = texts[4][8:11]
    add(engine, "string", prompt_of(21), dataclasses.replace(EIGHT, stop=[stop]))
    outputs = run(engine)["string"].outputs
    assert {o.finish_reason for o in outputs} == {"stop", "length"}
    for completion, text in zip(outputs, texts, strict=True):
        assert completion.text == text.split(stop)[0]
        assert completion.stop_reason == (stop if stop in text else None)


@pytest.mark.parametrize("beams", [False, True])
def test_prompt_logprobs_of_a_group(tiny, beams):
    """Those of one sequence, whatever follows; also where the prompt comes in several chunks."""
    single = tiny()
    scored = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)
    add(single, "one", prompt_of(60), scored)
    expected = run(single)["one"].prompt_logprobs
    for budget in (24, 72):
        engine = tiny(max_num_batched_tokens=budget)
        params = dataclasses.replace(scored, n=3, use_beam_search=beams, temperature=0.0 if beams else 1.0)
        for name in ("a", "b"):  # the second would find the prompt in the cache
            add(engine, name, prompt_of(60), params)
        for output in run(engine).values():
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == 60
            for at, alone in zip(output.prompt_logprobs[1:], expected[1:], strict=True):
                assert {t: x.rank for t, x in at.items()} == {t: x.rank for t, x in alone.items()}
                assert [x.logprob for x in at.values()] == pytest.approx([x.logprob for x in alone.values()], abs=1e-4)


# ----------------------------------------------------------------------------------------------------- refusals


def test_what_can_never_fit_is_refused_and_the_others_go_on(tiny, eight_requests):
    engine = tiny(num_blocks=36)
    add(engine, "n", prompt_of(21), dataclasses.replace(EIGHT, n=3))
    engine.step()
    with pytest.raises(InvalidRequestError, match="max_num_seqs=8: ask for fewer"):
        add(engine, "rows", prompt_of(5), SamplingParams(n=9))
    with pytest.raises(InvalidRequestError, match="9 sequences"):
        add(engine, "beams", prompt_of(5), SamplingParams(n=2, best_of=9, use_beam_search=True, temperature=0))
    with pytest.raises(InvalidRequestError, match="may need 45 blocks of 4 tokens and the whole pool has 35"):
        add(engine, "wide", prompt_of(21), SamplingParams(n=4, use_beam_search=True, temperature=0, max_tokens=40))
    assert engine.num_unfinished_requests == 1
    assert tokens_of(run(engine)["n"]) == eight_requests[:3]


# --------------------------------------------------------------------------------------------------- invariance

REFERENCE = np.load(GOLDENS / "models" / "llama" / "reference.npz")


def golden_search(prompt, **changes):
    stop = [int(REFERENCE[f"{prompt}_beameos_eos_id"])]
    options = {"n": 4, "max_tokens": 24, "stop_token_ids": stop, "logprobs": 2} | changes
    return REFERENCE[f"{prompt}_input_ids"].tolist(), SamplingParams(
        use_beam_search=True, temperature=0, ignore_eos=True, **options
    )


def sampled(length, **options):
    defaults = {"temperature": 1.0, "seed": length, "ignore_eos": True, "logprobs": 2}
    return prompt_of(length, 5 if length % 2 else 9), SamplingParams(**(defaults | options))


# Samples and beams, ends at different lengths; alone, each fits into 35 blocks. (No top_p and one number of
# candidates: every combination that meets in a step is a sampler to be compiled.)
REQUESTS = [
    golden_search("p0"),
    golden_search("p1", n=2, best_of=4),
    golden_search("p0", n=1, best_of=4, max_tokens=12),
    sampled(21, n=4, max_tokens=16),
    sampled(41, n=3, max_tokens=20),
    sampled(33, n=2, max_tokens=24, stop_token_ids=list(range(40))),
    sampled(13, n=1, best_of=5, max_tokens=12),
    sampled(1, n=6, max_tokens=10),
    sampled(63, n=1, max_tokens=30),
    sampled(22, n=1, max_tokens=30, temperature=0.0, seed=None),
]
_alone = {}


def outcome(output):
    """(tokens, finish reason) of each sequence, and all their log-probabilities."""
    exact = [(o.token_ids, o.finish_reason, o.stop_reason) for o in output.outputs]
    values = [at.logprob for o in output.outputs for position in o.logprobs for at in position.values()]
    return exact, values


def alone(tiny, index):
    if index not in _alone:
        engine = tiny(enable_prefix_caching=False)
        add(engine, "x", *REQUESTS[index])
        _alone[index] = outcome(run(engine)["x"])
    return _alone[index]


def check_against_alone(tiny, finished, places):
    for place, index in places:
        exact, values = outcome(finished[f"{place}"])
        expected, expected_values = alone(tiny, index)
        assert exact == expected
        np.testing.assert_allclose(values, expected_values, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=8),
    late=st.integers(0, 15),
    budget=st.sampled_from([24, 40, 72]),
    blocks=st.sampled_from([36, 50, 200]),
    caching=st.booleans(),
    mode=st.sampled_from(["auto", "swap", "recompute"]),
    swap_blocks=st.sampled_from([0, 20, 300]),
)
def test_groups_do_not_depend_on_anything_but_themselves(tiny, order, late, budget, blocks, caching, mode, swap_blocks):
    engine = tiny(
        num_blocks=blocks,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        preemption_mode=mode,
        swap_blocks=swap_blocks,
    )
    places = list(enumerate(order))
    half = len(order) // 2 + 1
    for place, index in places[:half]:
        add(engine, f"{place}", *REQUESTS[index])
    finished = {}

    def add_the_rest(step):
        if step == late:
            for place, index in places[half:]:
                add(engine, f"{place}", *REQUESTS[index])

    finished = run(engine, after_step=add_the_rest)
    if len(finished) < len(order):  # the first part was done before the second came
        for place, index in places[half:]:
            add(engine, f"{place}", *REQUESTS[index])
        finished |= run(engine)
    check_against_alone(tiny, finished, places)


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
def test_the_small_pool_really_preempts(tiny, mode):
    engine = tiny(num_blocks=36, enable_prefix_caching=False, preemption_mode=mode, swap_blocks=300)
    places = list(enumerate([*range(len(REQUESTS)), *range(len(REQUESTS))]))
    for place, index in places:
        add(engine, f"{place}", *REQUESTS[index])
    check_against_alone(tiny, run(engine), places)
    scheduler = engine.scheduler
    assert scheduler.num_preemptions >= 4
    assert (scheduler.num_swaps_in > 0) == (mode != "recompute")
