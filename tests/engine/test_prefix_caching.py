"""Prefix hits change nothing: with the cache and without it, outputs and log-probabilities are the same."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jpaged import SamplingParams
from tests.engine.support import run

BLOCK = 4  # of the `tiny` engines

KINDS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2),
    SamplingParams(seed=1, max_tokens=9, ignore_eos=True, logprobs=2),
    SamplingParams(seed=2, n=3, max_tokens=5, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, n=4, use_beam_search=True, max_tokens=5, ignore_eos=True, logprobs=2),
]


@st.composite
def prefix_trees(draw):
    """Requests (prompt, kind, salt) whose prompts grow out of one another, or out of nothing."""
    prompts = [[]]
    for i in range(draw(st.integers(2, 10))):
        parent = prompts[draw(st.integers(0, i))]
        cut = draw(st.sampled_from([len(parent), len(parent), len(parent) // 2, BLOCK]))
        start, length = draw(st.integers(5, 300)), draw(st.integers(1, 20))
        prompts.append((parent[:cut] + [start + (5 * j) % 70 for j in range(length)])[:60])
    salts = st.sampled_from(["", "", "", "salt"])
    return [(prompt, draw(st.integers(0, len(KINDS) - 1)), draw(salts)) for prompt in prompts[1:]]


def add(engine, request_id, request):
    prompt, kind, salt = request
    engine.add_request(request_id, {"prompt_token_ids": prompt, "cache_salt": salt}, KINDS[kind])


def serve(engine, waves):
    """Waves of requests, each served to its end before the next one comes; None forgets the cache."""
    finished = {}
    for i, wave in enumerate(waves):
        if wave is None:
            engine.blocks.reset_prefix_cache()
            continue
        for j, request in enumerate(wave):
            add(engine, f"{i} {j}", request)
        finished |= run(engine)
    return finished


def check_same(output, expected):
    assert [(o.token_ids, o.finish_reason) for o in output.outputs] == [
        (o.token_ids, o.finish_reason) for o in expected.outputs
    ]
    np.testing.assert_allclose(values(output), values(expected), atol=1e-4)


def values(output):
    return [at.logprob for o in output.outputs for position in o.logprobs for at in position.values()]


def in_common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=prefix_trees(),
    wave=st.integers(1, 4),
    reset=st.sampled_from([None, None, 1, 2]),
    blocks=st.sampled_from([34, 45, 200]),
    budget=st.sampled_from([24, 72]),
)
def test_outputs_with_the_cache_are_those_without(tiny, tree, wave, reset, blocks, budget):
    waves = [tree[i : i + wave] for i in range(0, len(tree), wave)]
    if reset is not None:
        waves.insert(min(reset, len(waves)), None)
    cached = serve(tiny(num_blocks=blocks, max_num_batched_tokens=budget), waves)
    plain = serve(tiny(enable_prefix_caching=False), waves)
    assert cached.keys() == plain.keys()
    known: list[tuple[str, list[int]]] = []  # what may be found: (salt, tokens)
    for i, requests in enumerate(waves):
        if requests is None:
            known = []
            continue
        for j, (prompt, _, salt) in enumerate(requests):
            output, expected = cached[f"{i} {j}"], plain[f"{i} {j}"]
            check_same(output, expected)
            assert expected.num_cached_tokens == 0
            if not output.metrics.num_preemptions:  # else it may have found its own blocks
                company = [(other, tokens) for k, (tokens, _, other) in enumerate(requests) if k != j]
                found = max(
                    (in_common(prompt, tokens) for other, tokens in known + company if other == salt), default=0
                )
                assert output.num_cached_tokens <= min(found, len(prompt) - 1) // BLOCK * BLOCK
        for j, (prompt, _, salt) in enumerate(requests):
            known += [(salt, prompt + o.token_ids) for o in cached[f"{i} {j}"].outputs]


@pytest.mark.parametrize("blocks", [34, 200])
def test_the_trees_really_hit_and_evict(tiny, blocks):
    trunk = [5 + 3 * i for i in range(40)]
    tree = [
        (trunk[:cut] + [300 + i] * (3 + i), i % len(KINDS), "") for i, cut in enumerate([40, 40, 17, 30, 8, 40] * 2)
    ]
    waves = [tree[i : i + 3] for i in range(0, len(tree), 3)]
    engine = tiny(num_blocks=blocks)
    cached, plain = serve(engine, waves), serve(tiny(enable_prefix_caching=False), waves)
    for name, output in cached.items():
        check_same(output, plain[name])
    assert sum(output.num_cached_tokens for output in cached.values()) >= 200
    distinct = len(engine.blocks.cache)
    assert distinct == 49 if blocks == 200 else distinct <= 33, "in the small pool, some have been evicted"
