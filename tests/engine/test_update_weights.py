"""Other weights under a running engine: no compile, no copy, no key or value of the old ones where it does not belong."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import checkpoints
from jpaged import BeamSearchParams, RequestOutputKind, SamplingParams
from jpaged.errors import InvalidConfigError, InvalidRequestError
from tests.engine.support import llm_of, run

PROMPT = {"prompt_token_ids": [5 + 3 * i % 300 for i in range(21)]}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


@pytest.fixture
def make(tiny):
    """Engines over the shared runner, which gets its own weights back."""
    runner = tiny().runner
    old = runner.params
    yield tiny
    runner.params = old


def other(params, factor=1.5):
    return jax.tree.map(lambda leaf: leaf * factor, params)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@contextlib.contextmanager
def counted(*names):
    """Events of tracing and compiling inside the block."""
    seen = []

    def listen(name, *_, **__):
        seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def fresh(make, params, prompt=PROMPT, sampling=GREEDY):
    """What an engine says that never had other weights."""
    engine = make(enable_prefix_caching=False)
    engine.runner.params = params
    return llm_of(engine).generate(prompt, sampling, use_tqdm=False)[0].outputs[0]


def test_no_trace_no_compile_no_copy_and_no_old_block(make):
    old = make().runner.params
    new = other(old)
    expected = fresh(make, new).token_ids, fresh(make, old).token_ids
    assert expected[0] != expected[1], "the test sees nothing if both say the same"
    llm = llm_of(make())
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected[1]
    with counted() as events:
        assert llm.update_weights(new) == 1
        [output] = llm.generate(PROMPT, GREEDY, use_tqdm=False)
        [again] = llm.generate(PROMPT, GREEDY, use_tqdm=False, params=new)
    assert [e for e in events if "compile" in e or "trace" in e] == []
    assert pointers(llm.params) == pointers(new)
    assert output.outputs[0].token_ids == expected[0]
    assert output.num_cached_tokens == 0
    assert again.outputs[0].token_ids == expected[0], "the same weights change nothing"
    assert again.num_cached_tokens > 0
    assert (output.weights_version, again.weights_version) == (1, 1)
    [back] = llm.generate(PROMPT, GREEDY, use_tqdm=False, params=old)
    assert back.outputs[0].token_ids == expected[1]
    assert back.num_cached_tokens == 0
    assert back.weights_version == 2


def test_the_counter_counts():
    with counted() as events:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    assert [e for e in events if "compile" in e]


def start(make, sampling, steps=6, **options):
    engine = make(**options)
    engine.add_request("x", PROMPT, sampling)
    early = [output for _ in range(steps) for output in engine.step()]
    return engine, early


def test_recompute_goes_on_as_if_the_new_weights_had_read_all_of_it(make):
    engine, _ = start(make, GREEDY)
    new = other(engine.params)
    engine.update_weights(new)
    known = list(engine._groups["x"].sequences[0].tokens)
    assert 0 < len(known) - 21 < 12
    [done] = run(engine).values()
    assert done.outputs[0].token_ids[: len(known) - 21] == known[21:], "what it had stays"
    params = SamplingParams(temperature=0, max_tokens=12 - (len(known) - 21), ignore_eos=True, logprobs=0)
    rest = fresh(make, new, {"prompt_token_ids": known}, params)
    assert done.outputs[0].token_ids[len(known) - 21 :] == rest.token_ids
    assert done.metrics.num_preemptions == 1
    assert done.weights_version == 1


def test_continue_keeps_the_old_keys_and_nobody_else_finds_them(make):
    engine, _ = start(make, GREEDY, steps=3)
    new = other(engine.params)
    engine.update_weights(new, in_flight="continue")
    [done] = run(engine).values()
    assert done.metrics.num_preemptions == 0
    assert done.weights_version == 1
    whole = {"prompt_token_ids": done.prompt_token_ids + done.outputs[0].token_ids}
    [next_one] = llm_of(engine).generate(whole, GREEDY, use_tqdm=False)
    assert next_one.num_cached_tokens == 0
    [last] = llm_of(engine).generate(whole, GREEDY, use_tqdm=False)
    assert last.num_cached_tokens > 21
    assert last.outputs[0].token_ids == next_one.outputs[0].token_ids
    assert next_one.outputs[0].token_ids == fresh(make, new, whole).token_ids  # in the same pool: at the end


def test_abort_ends_them_with_what_they_have(make):
    engine, _ = start(make, GREEDY)
    engine.add_request("waiting", PROMPT, GREEDY)
    engine.update_weights(other(engine.params), in_flight="abort")
    done = run(engine)
    assert {output.outputs[0].finish_reason for output in done.values()} == {"abort"}
    assert 0 < len(done["x"].outputs[0].token_ids) < 12
    assert done["x"].weights_version == 0


def test_streamed_tokens_are_all_delivered_once(make):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    engine, outputs = start(make, params)
    engine.update_weights(other(engine.params))
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert len([t for output in outputs for t in output.outputs[0].token_ids]) == 12
    assert outputs[0].weights_version is None
    assert outputs[-1].weights_version == 1


@pytest.mark.parametrize("policy", ["recompute", "continue"])
def test_beams_samples_and_swapped_groups_go_on(make, policy):
    engine = make(num_blocks=40, swap_blocks=100, preemption_mode="swap", enable_prefix_caching=True)
    engine.add_request(
        "beams", PROMPT, BeamSearchParams(beam_width=3, max_tokens=16, ignore_eos=True).as_sampling_params()
    )
    for i in range(3):
        params = SamplingParams(n=2, seed=i, max_tokens=40, ignore_eos=True)
        engine.add_request(f"n{i}", {"prompt_token_ids": [9 + i, *range(20)]}, params)
    version = swapped = 0

    def update(step):
        nonlocal version, swapped
        if step % 7 == 6:
            swapped += engine.scheduler.num_swapped
            version = engine.update_weights(other(engine.params, 1.01), in_flight=policy)
            engine.blocks.check_invariants()
            if policy == "recompute":
                assert engine.scheduler.num_swapped == 0
                assert engine.scheduler.swap_space.num_used == 0

    done = run(engine, after_step=update)
    assert version > 3
    assert swapped > 0
    assert {name: [len(o.token_ids) for o in out.outputs] for name, out in done.items()} == {
        "beams": [16] * 3, **{f"n{i}": [40] * 2 for i in range(3)}
    }  # fmt: skip


def test_sessions_and_pinned_prefixes_are_computed_anew(make):
    engine = make()
    llm, new = llm_of(engine), other(engine.params)
    with llm.session(PROMPT) as session, llm.session({"prompt_token_ids": list(range(40, 60))}) as pinned:
        session.logprobs(3)
        pinned.pin()
        llm.update_weights(new)
        assert session.num_computed_tokens == 0
        assert pinned.pinned
        assert pinned.num_computed_tokens == 20
        engine.blocks.check_invariants()
        [found] = llm.generate({"prompt_token_ids": list(range(40, 64))}, GREEDY, use_tqdm=False)
        assert found.num_cached_tokens == 20
        assert session.sample(GREEDY).token_ids == fresh(make, new).token_ids
    assert engine.blocks.num_used == 0


def test_half_scored_prompts_are_scored_by_the_new_weights(make):
    engine = make(max_num_batched_tokens=24)
    prompt = {"prompt_token_ids": [5 + 3 * i % 300 for i in range(90)]}
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    engine.add_request("x", prompt, params)
    for _ in range(3):
        engine.step()
    new = other(engine.params)
    engine.update_weights(new)
    assert engine.has_unfinished_requests()
    [got] = run(engine).values()
    expected = make(enable_prefix_caching=False)
    expected.runner.params = new
    [wanted] = llm_of(expected).generate(prompt, params, use_tqdm=False)
    for a, b, token in zip(
        got.prompt_logprobs[1:], wanted.prompt_logprobs[1:], prompt["prompt_token_ids"][1:], strict=True
    ):
        assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


def test_what_does_not_fit_changes_nothing(make):
    engine, _ = start(make, GREEDY)
    old = pointers(engine.params)
    broken = dict(engine.params)
    del broken["norm"]
    with pytest.raises(checkpoints.MissingWeightsError, match="missing: norm/scale"):
        engine.update_weights(broken)
    with pytest.raises(checkpoints.MissingWeightsError, match="misshapen: norm/scale"):
        engine.update_weights(engine.params | {"norm": {"scale": jnp.ones(3)}})
    with pytest.raises(InvalidConfigError, match="in_flight"):
        engine.update_weights(engine.params, in_flight="wait")
    assert pointers(engine.params) == old
    assert engine.weights_version == 0
    assert run(engine)["x"].outputs[0].token_ids == fresh(make, engine.params).token_ids


def forward_logprobs(engine, tokens):
    logits = engine.runner.model.apply({"params": engine.params}, jnp.array([tokens]), method="forward_logits")[0]
    scores = jax.nn.log_softmax(logits[:-1])
    return [float(scores[i, token]) for i, token in enumerate(tokens[1:])]


def test_scores_are_those_of_the_training_forward_whatever_is_cached(make):
    engine = make()
    llm, prompt = llm_of(engine), PROMPT["prompt_token_ids"]
    completions = [[7, 8, 9], [7, 8, 200, 11, 12, 13], [3], prompt[:9]]
    for _ in range(2):  # the second time everything is cached
        scores = llm.score(PROMPT, completions, use_tqdm=False)
        for completion, score in zip(completions, scores, strict=True):
            assert score == pytest.approx(forward_logprobs(engine, prompt + completion)[20:], abs=2e-5)
    assert engine.blocks.stats.hits > 7 * 16, "all but the first find the prompt's full blocks"
    [one] = llm.score([{"prompt_token_ids": [4]}], [[5, 6]], use_tqdm=False)
    assert one == pytest.approx(forward_logprobs(engine, [4, 5, 6]), abs=2e-5)


def test_what_can_not_be_scored_is_refused(make):
    llm = llm_of(make())
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.score(PROMPT, [[1], []])
    with pytest.raises(InvalidRequestError, match="as many completions"):
        llm.score([PROMPT, PROMPT], [[1]])
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.score(PROMPT, [[1], [10**6]])
    assert llm.engine.num_unfinished_requests == 0
