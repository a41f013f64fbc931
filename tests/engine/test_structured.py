"""Structured outputs through the engine: every output has its form, and nobody else notices."""

import json
import re

import jsonschema
import pytest

from jpaged import SamplingParams, StructuredOutputsParams
from jpaged.errors import InvalidRequestError
from tests.engine.support import run

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "boolean"},
    {"enum": ["red", 7, None, {"x": [1]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"const": "é😀\n"}]},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"$defs": {"n": {"type": "integer", "minimum": -5, "maximum": 5}}, "type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 2},
]  # fmt: skip


def sampled(seed, max_tokens=160, **constraint):
    return SamplingParams(seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**constraint))


def prompt(index):
    return {"prompt_token_ids": [5 + (7 * index + 3 * j) % 370 for j in range(4 + 5 * index)]}


def requests():
    """Constrained ones on the golden Llama, whose weights are random: nothing but the masks gives them a form."""
    yield from (sampled(i, json=schema) for i, schema in enumerate(SCHEMAS))
    yield sampled(1, choice=["yes", "no", "yes and no"])
    yield sampled(2, regex=r"\d{3}-[a-f]{2}(/x)?")
    yield sampled(3, grammar='start: "(" start ")" | "x"')


@pytest.fixture(scope="module")
def alone(tiny):
    outputs = []
    for i, params in enumerate(requests()):
        engine = tiny(enable_prefix_caching=False)
        engine.add_request("x", prompt(i % 5), params)
        outputs.append(run(engine)["x"].outputs[0])
    return outputs


def check(output, params):
    constraint = params.structured_outputs
    assert output.finish_reason == "stop"
    if constraint.json is not None:
        jsonschema.validate(json.loads(output.text), json.loads(constraint.json))
    elif constraint.choice is not None:
        assert output.text in constraint.choice
    elif constraint.regex is not None:
        assert re.fullmatch(constraint.regex, output.text, re.ASCII)
    else:
        assert re.fullmatch(r"\(*x\)*", output.text)


def test_every_output_has_its_form(alone):
    for output, params in zip(alone, requests(), strict=True):
        check(output, params)


@pytest.mark.parametrize("blocks", [None, 48])
def test_in_a_batch_the_tokens_are_the_same_and_others_are_not_touched(tiny, alone, blocks):
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
    engine = tiny(enable_prefix_caching=False)
    engine.add_request("free", prompt(2), free)
    undisturbed = run(engine)["free"].outputs[0]
    engine = tiny(num_blocks=blocks)
    for i, params in enumerate(requests()):
        engine.add_request(str(i), prompt(i % 5), params)
        if i % 3 == 0:
            engine.add_request(f"free {i}", prompt(2), free)
    finished = run(engine)
    assert [finished[str(i)].outputs[0].token_ids for i in range(len(alone))] == [o.token_ids for o in alone]
    for i in range(0, len(alone), 3):
        assert finished[f"free {i}"].outputs[0].token_ids == undisturbed.token_ids
    assert blocks is None or engine.scheduler.num_preemptions > 0


def test_samples_each_have_their_own_place(tiny):
    engine = tiny()
    params = SamplingParams(n=4, seed=3, max_tokens=160, structured_outputs=StructuredOutputsParams(json=PERSON))
    engine.add_request("x", prompt(1), params)
    outputs = run(engine)["x"].outputs
    for output in outputs:
        check(output, params)
    assert len({o.text for o in outputs}) == 4


def test_what_contradicts_the_form_gives_way(tiny):
    constraint = StructuredOutputsParams(choice=["yes"])
    params = SamplingParams(min_tokens=30, max_tokens=40, allowed_token_ids=[300], bad_words=["y"], structured_outputs=constraint)  # fmt: skip
    engine = tiny()
    engine.add_request("x", prompt(1), params)
    output = run(engine)["x"].outputs[0]
    assert (output.text, output.finish_reason) == ("yes", "stop")


def test_a_bad_constraint_is_refused_or_fails_alone(tiny, alone):
    engine = tiny()
    with pytest.raises(InvalidRequestError, match="regex"):
        engine.add_request("bad", prompt(0), sampled(1, regex="(("))
    engine.add_request("explodes", prompt(0), sampled(1, grammar="start: s\ns: s s | s s s | s s s s | /[a-z]/\n"))
    engine.add_request("0", prompt(0), sampled(0, json=SCHEMAS[0]))
    finished = run(engine)
    exploded = finished["explodes"].outputs[0]
    assert exploded.finish_reason in ("error", "stop")
    assert finished["0"].outputs[0].token_ids == alone[0].token_ids


def test_abort_and_a_late_arrival(tiny, alone):
    engine = tiny()
    engine.add_request("gone", prompt(1), sampled(1, json=PERSON))

    def come_and_go(step):
        if step == 3:
            engine.abort("gone")
            engine.add_request("0", prompt(0), sampled(0, json=SCHEMAS[0]))

    finished = run(engine, after_step=come_and_go)
    assert finished["gone"].outputs[0].finish_reason == "abort"
    assert finished["0"].outputs[0].token_ids == alone[0].token_ids


def test_smollm2_answers_in_json(smollm2):
    engine = smollm2()
    for i in range(2):
        params = SamplingParams(temperature=float(i), seed=i, max_tokens=64, structured_outputs=StructuredOutputsParams(json=PERSON))  # fmt: skip
        engine.add_request(str(i), [{"role": "user", "content": "Describe a person as JSON."}], params)
    finished = run(engine)
    for i in range(2):
        check(finished[str(i)].outputs[0], params)
