"""Beam search with stop strings and with grammars equals a plain search over the dense forward pass."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import SamplingParams, StructuredOutputsParams
from tests.engine.support import run

PROMPT = [5 + (7 * i) % 370 for i in range(11)]
GRAMMARS = [
    {"choice": ["yes", "no", "yes and no", "maybe"]},
    {"choice": ["only this"]},
    {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}},
    {"regex": "[a-e]{1,4}(x|yy)?"},
]


@pytest.fixture(scope="module")
def logprobs(tiny):
    engine = tiny(enable_prefix_caching=False)
    model, params = engine.runner.model, engine.params

    @jax.jit
    def at(tokens, last):
        logits = model.apply({"params": params}, tokens[None], method="forward_logits")[0]
        return jax.nn.log_softmax(logits[last])

    @functools.cache
    def of(tokens):
        padded = jnp.zeros(64, jnp.int32).at[: len(tokens)].set(jnp.array(tokens))
        return np.asarray(at(padded, len(tokens) - 1))

    return of


def search(engine, logprobs, params):
    """(tokens, score, text) of the best hypotheses: the textbook's search, which knows no ranks and no trees."""
    grammar = params.structured_outputs and engine.grammars.matcher(params.structured_outputs)
    decode = functools.partial(engine.tokenizer.decode, skip_special_tokens=True)
    running, finished = [((), np.float32(0))], []
    for length in range(1, params.max_tokens + 1):
        offered = []
        for tokens, score in running:
            scores = score + logprobs(tuple(PROMPT) + tokens)
            if grammar:
                matcher = grammar.fork()
                matcher.advance(list(tokens))
                bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[: len(scores)]
                scores = np.where(bits, scores, -np.inf)
            offered += [(scores[t], (*tokens, t)) for t in np.argsort(-scores)[:16].tolist() if scores[t] > -np.inf]
        offered.sort(key=lambda x: -x[0])
        running = []
        for i, (score, tokens) in enumerate(offered[: params.n * 2]):
            text = decode(tokens)
            stopped = tokens[-1] in engine.eos_token_ids or any(s in text for s in params.stop)
            if not stopped and length < params.max_tokens:
                running.append((tokens, score))
            elif i < params.n:
                finished.append((list(tokens), score / np.float32(length), text))
        running = running[: params.n]
        finished = sorted(finished, key=lambda x: -x[1])[: params.n]
        if not running or (len(finished) == params.n and running[0][1] / length <= finished[-1][1]):
            break
    return finished


def beams(max_tokens=24, **constraint):
    return SamplingParams(n=4, use_beam_search=True, temperature=0, max_tokens=max_tokens, **constraint)


def equal(outputs, expected, stop=()):
    assert [o.token_ids for o in outputs] == [tokens for tokens, _, _ in expected]
    assert [o.score for o in outputs] == pytest.approx([score for _, score, _ in expected], abs=1e-4)
    for output, (_, _, text) in zip(outputs, expected, strict=True):
        if isinstance(output.stop_reason, str):
            assert output.text == text[: text.index(output.stop_reason)]
        else:
            assert not any(s in text for s in stop)
            assert output.text == text


@pytest.mark.parametrize("constraint", GRAMMARS, ids=lambda c: next(iter(c)))
def test_every_hypothesis_has_the_form(tiny, logprobs, constraint):
    params = beams(structured_outputs=StructuredOutputsParams(**constraint))
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, params)
    outputs = run(engine)["x"].outputs
    equal(outputs, search(engine, logprobs, params))
    assert {o.finish_reason for o in outputs} == {"stop"}
    if "choice" in constraint:
        assert {o.text for o in outputs} <= set(constraint["choice"])
    if "json" in constraint:
        assert all(json.loads(o.text) for o in outputs)


@pytest.fixture(scope="module")
def stops(tiny):
    """Strings that unconstrained beams contain, across tokens and inside one, and one that none contains."""
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams())
    text = run(engine)["x"].outputs[0].text
    words = [word for word in re.findall(r"[ -~]+", text) if len(word) > 1]
    return words[0][:2], words[-1][-2:], "o", "no such thing"


def test_stop_strings_end_hypotheses(tiny, logprobs, stops):
    params = beams(stop=list(stops))
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, params)
    outputs = run(engine)["x"].outputs
    assert any(o.stop_reason in stops for o in outputs)
    equal(outputs, search(engine, logprobs, params), stops)


def test_nothing_changes_in_a_batch_that_is_preempted(tiny, stops):
    requests = {f"grammar {i}": {"structured_outputs": StructuredOutputsParams(**g)} for i, g in enumerate(GRAMMARS)}
    requests |= {"stop": {"stop": list(stops)}, "kept": {"stop": list(stops), "include_stop_str_in_output": True}}
    alone, engine = {}, tiny(num_blocks=36, swap_blocks=40)
    for name, constraint in requests.items():
        single = tiny(enable_prefix_caching=False)
        single.add_request(name, {"prompt_token_ids": PROMPT}, beams(**constraint))
        alone |= run(single)
    for name, constraint in requests.items():
        engine.add_request(name, {"prompt_token_ids": PROMPT}, beams(**constraint))
        free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        engine.add_request(f"free {name}", {"prompt_token_ids": PROMPT[::-1] * 2}, free)
    together = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for name in requests:
        assert [o.token_ids for o in together[name].outputs] == [o.token_ids for o in alone[name].outputs]
        assert [o.text for o in together[name].outputs] == [o.text for o in alone[name].outputs]
    for stop, kept in zip(alone["stop"].outputs, alone["kept"].outputs, strict=True):
        by_string = isinstance(stop.stop_reason, str)
        assert kept.text == stop.text + (stop.stop_reason if by_string else "")


def test_a_grammar_that_explodes_ends_its_request_alone(tiny):
    explodes = StructuredOutputsParams(grammar="start: s\ns: s s | s s s | s s s s | /[a-z]/\n")
    engine = tiny()
    engine.add_request("explodes", {"prompt_token_ids": PROMPT}, beams(max_tokens=60, structured_outputs=explodes))
    engine.add_request("fine", {"prompt_token_ids": PROMPT}, beams(max_tokens=6))
    finished = run(engine)
    assert {o.finish_reason for o in finished["explodes"].outputs} <= {"error", "stop", "length"}
    assert len(finished["fine"].outputs) == 4
