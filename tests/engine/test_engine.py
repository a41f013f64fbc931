"""The engine from outside: requests in, outputs out, errors where they belong."""

import dataclasses

import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.errors import EngineDeadError, InvalidConfigError, InvalidRequestError, OutOfMemoryError
from jpaged.models.config import LayerGroups
from jpaged.sampling_params import RequestOutputKind
from tests.engine.support import llm_of, run

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompt_of(*tokens):
    return {"prompt_token_ids": list(tokens)}


def generate(engine, prompt, params):
    engine.add_request("only", prompt, params)
    return run(engine)["only"].outputs[0]


# ------------------------------------------------------------------------------------------------------ stopping


def test_stop_string_across_and_inside_tokens(smollm2):
    text = generate(smollm2(), "The capital of France is", SamplingParams(temperature=0, max_tokens=24)).text
    for begin, end in ((3, 5), (7, 18), (10, 11)):
        stop = text[begin:end]
        first = text.index(stop)
        output = generate(
            smollm2(), "The capital of France is", SamplingParams(temperature=0, max_tokens=24, stop=[stop])
        )
        assert output.text == text[:first]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        kept = generate(
            smollm2(),
            "The capital of France is",
            SamplingParams(temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=True),
        )
        assert kept.text == text[: first + len(stop)]


def test_streamed_deltas_add_up_and_never_show_a_stop_string(smollm2):
    whole = generate(smollm2(), "Once upon a time", SamplingParams(temperature=0, max_tokens=30))
    stop = whole.text[40:52]
    engine = smollm2()
    engine.add_request(
        "d",
        "Once upon a time",
        SamplingParams(temperature=0, max_tokens=30, stop=[stop], output_kind=RequestOutputKind.DELTA, logprobs=0),
    )
    text, tokens, logprobs = "", [], []
    while engine.has_unfinished_requests():
        for output in engine.step():
            piece = output.outputs[0]
            text, tokens, logprobs = text + piece.text, tokens + piece.token_ids, logprobs + piece.logprobs
            assert whole.text.startswith(text)
            assert stop not in text
    assert text == whole.text[: whole.text.index(stop)]
    assert tokens == whole.token_ids[: len(tokens)]
    assert len(logprobs) == len(tokens)


def test_stop_token_min_tokens_and_ignore_eos(tiny):
    tokens = generate(tiny(), prompt_of(5, 6, 7), GREEDY).token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    output = generate(tiny(), prompt_of(5, 6, 7), SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))
    assert output.token_ids == tokens[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    later = generate(
        tiny(), prompt_of(5, 6, 7), SamplingParams(temperature=0, max_tokens=12, min_tokens=9, stop_token_ids=[stop])
    )
    assert stop not in later.token_ids[:9]
    assert len(later.token_ids) >= 9


def test_max_tokens_and_context_length(tiny):
    assert generate(tiny(), prompt_of(5), GREEDY).finish_reason == "length"
    to_the_end = generate(
        tiny(), prompt_of(*range(5, 205)), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    )
    assert len(to_the_end.token_ids) == 256 - 200
    assert to_the_end.finish_reason == "length"


# --------------------------------------------------------------------------------------------------------- rules


def test_logit_bias_allowed_and_bad_words(smollm2):
    engine = smollm2()
    plain = generate(engine, "The capital of France is", SamplingParams(temperature=0, max_tokens=8))
    assert "Paris" in plain.text
    without = generate(
        engine, "The capital of France is", SamplingParams(temperature=0, max_tokens=8, bad_words=["Paris"])
    )
    assert "Paris" not in without.text
    token = plain.token_ids[0]
    biased = generate(
        engine, "The capital of France is", SamplingParams(temperature=0, max_tokens=8, logit_bias={token: -100})
    )
    assert biased.token_ids[0] != token
    allowed = (100, 200, 300)
    only = generate(
        engine, "The capital of France is", SamplingParams(max_tokens=8, allowed_token_ids=allowed, ignore_eos=True)
    )
    assert set(only.token_ids) <= set(allowed)


def test_rules_leave_with_their_request(tiny):
    """Whoever gets the row next has none of them, also while others have rules."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("alone", prompt_of(1), greedy)
    want = run(engine)["alone"].outputs[0].token_ids
    rules = [{"logit_bias": {9: 100.0}}, {"allowed_token_ids": [7]}, {"min_tokens": 8, "bad_words": ["a"]}]
    for i, rule in enumerate(rules):
        engine.add_request(f"before {i}", prompt_of(2), dataclasses.replace(greedy, **rule))
    run(engine)
    for i in range(3):
        engine.add_request(str(i), prompt_of(1), greedy)
    engine.add_request("with rules", prompt_of(3), dataclasses.replace(greedy, min_tokens=1))
    got = run(engine)
    assert [got[str(i)].outputs[0].token_ids for i in range(3)] == [want] * 3


def test_penalties_act_and_leave_others_alone(smollm2):
    engine = smollm2()
    prompt = "one two one two one two one two"
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("plain", prompt, params)
    for name, value in (("presence_penalty", 2.0), ("frequency_penalty", 2.0), ("repetition_penalty", 1.5)):
        engine.add_request(name, prompt, dataclasses.replace(params, **{name: value}))
    tokens = {name: output.outputs[0].token_ids for name, output in run(engine).items()}
    assert tokens["plain"] == generate(smollm2(), prompt, params).token_ids
    assert len(set(tokens["plain"])) < 4, "without penalties it repeats itself"
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert len(set(tokens[name])) > len(set(tokens["plain"])), name


# -------------------------------------------------------------------------------------------------- prefix cache


def test_prefix_cache_hits_and_changes_nothing(tiny):
    shared = list(range(10, 70))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    with_cache, without = tiny(), tiny(enable_prefix_caching=False)
    for engine in (with_cache, without):
        for i in range(5):
            engine.add_request(str(i), prompt_of(*shared, 100 + i), params)
    a, b = run(with_cache), run(without)
    # All five arrive together: the first computes the shared blocks in the very step in which the others read them.
    assert [a[str(i)].num_cached_tokens for i in range(5)] == [0, 60, 60, 60, 60]
    assert all(b[str(i)].num_cached_tokens == 0 for i in range(5))
    for i in range(5):
        one, other = a[str(i)].outputs[0], b[str(i)].outputs[0]
        assert one.token_ids == other.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
    salted = with_cache
    salted.add_request("salt", prompt_of(*shared, 1) | {"cache_salt": "tenant"}, params)
    assert run(salted)["salt"].num_cached_tokens == 0
    with_cache.blocks.reset_prefix_cache()
    with_cache.add_request("reset", prompt_of(*shared, 1), params)
    assert run(with_cache)["reset"].num_cached_tokens == 0


def test_second_turn_of_a_chat_reuses_the_first(smollm2):
    engine = smollm2()
    chat = [{"role": "user", "content": "Name a colour."}]
    engine.add_request("1", chat, SamplingParams(temperature=0, max_tokens=40))
    first = run(engine)["1"]
    chat += [{"role": "assistant", "content": first.outputs[0].text}, {"role": "user", "content": "And another."}]
    engine.add_request("2", chat, SamplingParams(temperature=0, max_tokens=4))
    second = run(engine)["2"]
    assert second.num_cached_tokens >= (len(first.prompt_token_ids) // 16) * 16


# --------------------------------------------------------------------------------------------- abort and priority


def test_abort_in_every_state(tiny):
    engine = tiny(num_blocks=40)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for i in range(12):
        engine.add_request(str(i), prompt_of(*range(5 + i, 35 + i)), params)
    engine.abort("11")  # never scheduled
    engine.step()
    engine.abort("0")  # its first step is in flight
    engine.step()
    engine.abort(["1", "nobody"])
    for _ in range(12):
        engine.step()
    engine.abort([str(i) for i in range(2, 8)])
    finished = run(engine)
    assert engine.num_unfinished_requests == 0
    expected = {str(i): generate(tiny(), prompt_of(*range(5 + i, 35 + i)), params).token_ids for i in (8, 9, 10)}
    assert {i: finished[i].outputs[0].token_ids for i in expected} == expected


def test_aborted_request_says_so_and_its_id_is_free(tiny):
    engine = tiny()
    engine.add_request("a", prompt_of(5, 6), GREEDY)
    engine.step()
    engine.abort("a")
    outputs = engine.step()
    assert [o.outputs[0].finish_reason for o in outputs if o.request_id == "a" and o.finished] == ["abort"]
    engine.add_request("a", prompt_of(5, 6), GREEDY)
    assert len(run(engine)["a"].outputs[0].token_ids) == 12


def test_priority_serves_the_urgent_first(tiny):
    engine = tiny(scheduling_policy="priority")
    for i in range(16):
        engine.add_request(str(i), prompt_of(*range(5, 45)), GREEDY, priority=-i)
    order = []
    while engine.has_unfinished_requests():
        order += [int(o.request_id) for o in engine.step() if o.finished]
    assert order[:8] == sorted(order[:8], reverse=True)
    assert set(order[:8]) == set(range(8, 16))
    with pytest.raises(InvalidRequestError, match="priority"):
        tiny().add_request("x", prompt_of(5), GREEDY, priority=1)


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (prompt_of(), GREEDY, "empty"),
        ("", GREEDY, "empty"),
        (prompt_of(*[5] * 256), GREEDY, "max_model_len"),
        (prompt_of(5, 384), GREEDY, "vocabulary"),
        (prompt_of(5, -1), GREEDY, "vocabulary"),
        (prompt_of(5, True), GREEDY, "vocabulary"),
        ({"prompt_token_ids": [1.5]}, GREEDY, "vocabulary"),
        ({"prompt_token_ids": ["5"]}, GREEDY, "vocabulary"),
        ({"text": "hello"}, GREEDY, "prompt"),
        (7, GREEDY, "prompt"),
        (None, GREEDY, "prompt"),
        ("\ud800", GREEDY, "Unicode"),
        ([{"role": "user"}], GREEDY, "content"),
        ([{"role": "user", "content": 3}], GREEDY, "content"),
        (prompt_of(5) | {"cache_salt": 3}, GREEDY, "cache_salt"),
        (prompt_of(5), SamplingParams(stop_token_ids=[384]), "stop_token_ids"),
        (prompt_of(5), SamplingParams(logit_bias={384: 1.0}), "logit_bias"),
        (prompt_of(5), SamplingParams(allowed_token_ids=[384]), "allowed_token_ids"),
        (prompt_of(5), SamplingParams(allowed_token_ids=[2], min_tokens=3), "no token"),
        (prompt_of(5), SamplingParams(bad_words=["a very long phrase that no table holds, and longer"]), "bad word"),
        (prompt_of(5), SamplingParams(n=9), "max_num_seqs"),
    ],
)
def test_bad_requests_are_refused_and_running_ones_untouched(tiny, prompt, params, message):
    engine = tiny()
    engine.add_request("good", prompt_of(5, 6, 7), GREEDY)
    engine.step()
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("bad", prompt, params)
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add_request("good", prompt_of(5), GREEDY)
    assert run(engine)["good"].outputs[0].token_ids == generate(tiny(), prompt_of(5, 6, 7), GREEDY).token_ids


def test_what_can_never_fit_is_refused(tiny):
    engine = tiny(num_blocks=20)
    with pytest.raises(InvalidRequestError, match="blocks"):
        engine.add_request("a", prompt_of(*[5] * 70), SamplingParams(max_tokens=60))
    engine.add_request("b", prompt_of(*[5] * 30), SamplingParams(max_tokens=40, ignore_eos=True))
    assert len(run(engine)["b"].outputs[0].token_ids) == 40


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_size": 0},
        {"dtype": "float8"},
        {"gpu_memory_utilization": 1.5},
        {"gpu_memory_utilization": float("nan")},
        {"max_num_seqs": True},
        {"scheduling_policy": "lottery"},
        {"max_num_batched_tokens": 8},
        {"watermark": -1.0},
        {"num_gpu_blocks_override": 1},
    ],
)
def test_bad_engine_arguments(arguments):
    from jpaged.config import EngineConfig

    with pytest.raises(InvalidConfigError, match=next(iter(arguments))):
        EngineConfig(**arguments)


def test_budget_too_small_for_a_block():
    import jax.numpy as jnp

    from jpaged.runtime.kv_pool import KVPoolSpec, blocks_in_budget

    spec = KVPoolSpec(LayerGroups.of([None, None]), 2, 16, 2, 64, jnp.dtype("float32"))
    assert blocks_in_budget(10 * spec.block_bytes, spec, 100) == 10
    assert blocks_in_budget(1000 * spec.block_bytes, spec, 100) == 100
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes"):
        blocks_in_budget(spec.block_bytes, spec, 100)


def test_a_failed_step_is_told_and_remembered(tiny, monkeypatch):
    engine = tiny()
    engine.add_request("a", prompt_of(5), GREEDY)
    monkeypatch.setattr(engine, "runner", None)
    with pytest.raises(EngineDeadError, match="step failed"):
        engine.step()
    with pytest.raises(EngineDeadError, match="earlier error"):
        engine.add_request("b", prompt_of(5), GREEDY)


def test_interrupt_while_waiting_loses_nothing(tiny, monkeypatch):
    """Ctrl-C lands where the time is spent: in waiting for the device."""
    from jpaged.runtime.runner import StepResult

    expected = generate(tiny(), prompt_of(5, 6, 7), GREEDY).token_ids
    engine = tiny()
    engine.add_request("a", prompt_of(5, 6, 7), GREEDY)
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:

        def interrupted(self):
            raise KeyboardInterrupt

        patch.setattr(StepResult, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert run(engine)["a"].outputs[0].token_ids == expected


def test_interrupt_while_launching_loses_nothing(tiny, monkeypatch):
    """The plan that was made never runs: its blocks must not be found in the prefix cache, its tokens are not skipped."""
    shared = list(range(10, 60))
    expected = [generate(tiny(), prompt_of(*shared, i), GREEDY).token_ids for i in (1, 2)]
    for when in (0, 1, 3):
        engine = tiny()
        engine.add_request("1", prompt_of(*shared, 1), GREEDY)
        for _ in range(when):
            engine.step()
        engine.add_request("2", prompt_of(*shared, 2), GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.runner), "forward", lambda self, plan: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        finished = run(engine)
        assert [finished[i].outputs[0].token_ids for i in ("1", "2")] == expected


# ----------------------------------------------------------------------------------------------------- offline API


def test_llm_generate_and_chat(tiny, monkeypatch):
    from jpaged.llm import LLM

    llm = llm_of(tiny())
    outputs = llm.generate([prompt_of(5, 6), "hello", {"prompt": "hello"}], [GREEDY] * 3, use_tqdm=False)
    assert outputs[1].outputs[0].token_ids == outputs[2].outputs[0].token_ids
    assert outputs[1].prompt == "hello"
    chat = [{"role": "user", "content": "hello"}]
    by_chat, by_prompt = llm.chat(chat, GREEDY, use_tqdm=False)[0], llm.generate(chat, GREEDY, use_tqdm=False)[0]
    assert by_chat.prompt_token_ids == by_prompt.prompt_token_ids
    assert by_chat.outputs[0].token_ids == by_prompt.outputs[0].token_ids
    with pytest.raises(InvalidRequestError):
        llm.generate([prompt_of(5), prompt_of()], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests() or llm.engine.step() is not None
    run(llm.engine)
    with pytest.raises(InvalidRequestError, match="as many"):
        llm.generate([prompt_of(5)], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(TypeError):
        LLM(model="x", no_such_argument=1)


def test_metrics_and_logprob_dicts(tiny):
    engine = tiny()
    engine.add_request("m", "hello there", SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True))
    output = run(engine)["m"]
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    for token, at in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        assert at[token].rank == 1
        assert len(at) == 3
        assert at[token].decoded_token == engine.tokenizer.decode([token])
    total = sum(at[t].logprob for t, at in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    assert np.isfinite(total)
