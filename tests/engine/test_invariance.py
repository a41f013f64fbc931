"""A request's tokens are its own: what else runs, how prompts are cut and what is preempted never shows in them."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from jpaged import SamplingParams
from tests.engine.support import run

REQUESTS = [
    (
        [5 + (7 * i + 3 * j) % 370 for j in range(length)],
        SamplingParams(temperature=1.0, top_p=0.9, seed=1000 + i, max_tokens=out, ignore_eos=True),
    )
    for i, (length, out) in enumerate([(3, 20), (16, 12), (17, 30), (40, 8), (64, 16), (90, 25), (1, 40), (33, 10)])
]
_alone: dict[int, list[int]] = {}


def alone(tiny, index):
    if index not in _alone:
        engine = tiny(enable_prefix_caching=False)
        prompt, params = REQUESTS[index]
        engine.add_request("x", {"prompt_token_ids": prompt}, params)
        _alone[index] = run(engine)["x"].outputs[0].token_ids
    return _alone[index]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=12),
    late=st.integers(0, 15),
    budget=st.sampled_from([24, 40, 72]),
    blocks=st.sampled_from([34, 60, 200]),
    caching=st.booleans(),
)
def test_sampled_tokens_do_not_depend_on_the_batch(tiny, order, late, budget, blocks, caching):
    engine = tiny(num_blocks=blocks, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    half = len(order) // 2

    def add(part):
        for place, index in part:
            prompt, params = REQUESTS[index]
            engine.add_request(f"{place}", {"prompt_token_ids": prompt}, params)

    places = list(enumerate(order))
    add(places[: half + 1])

    def add_the_rest(step):
        if step == late:
            add(places[half + 1 :])

    finished = run(engine, after_step=add_the_rest)
    if late not in range(1000) or len(finished) < len(order):  # the first part was done before the second came
        add(places[len(finished) :])
        finished |= run(engine)
    for place, index in places:
        assert finished[str(place)].outputs[0].token_ids == alone(tiny, index)


def test_small_pool_really_preempts(tiny):
    engine = tiny(num_blocks=34, enable_prefix_caching=False)
    for i, (prompt, params) in enumerate(REQUESTS):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    finished = run(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [finished[str(i)].outputs[0].token_ids for i in range(len(REQUESTS))] == [
        alone(tiny, i) for i in range(len(REQUESTS))
    ]
    assert max(finished[str(i)].metrics.num_preemptions for i in range(len(REQUESTS))) > 0


def test_samples_of_one_request_are_those_of_their_index(tiny):
    prompt = REQUESTS[4][0]
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True, n=4)
    engine = tiny()
    engine.add_request("n", {"prompt_token_ids": prompt}, params)
    outputs = run(engine)["n"].outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4, "samples must differ"
    single = tiny(num_blocks=60)
    single.add_request(
        "1", {"prompt_token_ids": prompt}, SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    )
    assert run(single)["1"].outputs[0].token_ids == outputs[0].token_ids


def test_unseeded_requests_follow_the_engine_seed(tiny):
    def tokens(seed):
        engine = tiny(seed=seed)
        for i in range(2):
            engine.add_request(str(i), {"prompt_token_ids": [9, 8, 7]}, SamplingParams(max_tokens=12, ignore_eos=True))
        finished = run(engine)
        return [finished[str(i)].outputs[0].token_ids for i in range(2)]

    first = tokens(0)
    assert first == tokens(0)
    assert first != tokens(1)
    assert first[0] != first[1], "two requests must not share their random numbers"
