"""Grammars and matchers over real tokenizers: what they allow, what they refuse."""

import random
import re

import numpy as np
import pytest

from jpaged.errors import InvalidRequestError
from jpaged.structured import Grammars, StructuredOutputsParams, grammars

V, EOS = 49152, 2


@pytest.fixture(scope="module")
def compiled(smollm2_tokenizer):
    return Grammars(smollm2_tokenizer, V, frozenset({EOS}))


def tokens_of(matcher):
    return np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")).tolist()


def walk(matcher, seed):
    """A random output of a grammar, without its end; [] and more."""
    output, rng = [], random.Random(seed)
    while (token := rng.choice(tokens_of(matcher))) != EOS:
        output.append(token)
        matcher.advance(output)
    return output


def test_choices_are_spelled_in_every_way_and_then_end(compiled, smollm2_tokenizer):
    choices = ['"quoted"\n', "é😀", "yes", "yes and no", "{}\\"]
    params = StructuredOutputsParams(choice=choices)
    seen = {smollm2_tokenizer.decode(walk(compiled.matcher(params), seed)) for seed in range(60)}
    assert seen == set(choices)


def test_a_regex_matches_the_whole_output_and_digits_are_ascii(compiled, smollm2_tokenizer):
    params = StructuredOutputsParams(regex=r"\d{3}-[a-f]{2}(/x)?")
    for seed in range(20):
        text = smollm2_tokenizer.decode(walk(compiled.matcher(params), seed))
        assert re.fullmatch(r"[0-9]{3}-[a-f]{2}(/x)?", text)


@pytest.mark.parametrize("grammar", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'])
def test_lark_and_gbnf(compiled, smollm2_tokenizer, grammar):
    for seed in range(10):
        text = smollm2_tokenizer.decode(walk(compiled.matcher(StructuredOutputsParams(grammar=grammar)), seed))
        assert text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)


def test_a_fork_goes_its_own_way(compiled):
    one = compiled.matcher(StructuredOutputsParams(regex="(ab|cd)+"))
    before = tokens_of(one)
    other = one.fork()
    other.advance(before[:1])
    assert tokens_of(one) == before != tokens_of(other)


HOSTILE = [
    {"regex": "(("},
    {"regex": "(" * 500 + "a" + ")" * 500},
    {"regex": r"[^\s\S]"},
    {"json": {"$ref": "#"}},
    {"json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}, "$ref": "#/$defs/a"}},
    {"json": {"$ref": "http://example.com/schema"}},
    {"json": {"type": "florp"}},
    {"json": {"type": "array", "uniqueItems": True}},
    {"json": {"allOf": [{"anyOf": [{"required": [f"p{i}"]}, {"required": [f"q{i}"]}]} for i in range(16)]}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}},
    {"grammar": "start: nobody"},
    {"grammar": 'start: start "a"'},
    {
        "grammar": "start: "
        + "|".join(f"a{i}" for i in range(200))
        + "\n"
        + "\n".join(f"a{i}: /[a-z]/ start | /[a-z]/" for i in range(200))
    },
]


@pytest.mark.parametrize("arguments", HOSTILE, ids=lambda a: str(a)[:40])
def test_what_cannot_be_served_is_refused(compiled, arguments):
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        compiled.matcher(StructuredOutputsParams(**arguments))


def test_a_compilation_that_does_not_end_is_left_alone(compiled, monkeypatch):
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.0)
    with pytest.raises(InvalidRequestError, match="longer than"):
        compiled.matcher(StructuredOutputsParams(json={"type": "integer", "multipleOf": 99991}))
    monkeypatch.undo()
    assert compiled.matcher(StructuredOutputsParams(regex="later")).error is None


def test_an_explosion_after_the_beginning_ends_in_an_error(compiled):
    matcher = compiled.matcher(StructuredOutputsParams(grammar='start: s\ns: s s | s s s | s s s s | /[a-z]/ | ""\n'))
    output, rng = [], random.Random(0)
    while matcher.error is None:
        output.append(rng.choice([t for t in tokens_of(matcher) if t != EOS]))
        matcher.advance(output)
        matcher.allowed()
        assert len(output) < 100
    assert "many items" in matcher.error


def test_the_cache_is_bounded(smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_COMPILED", 2)
    few = Grammars(smollm2_tokenizer, V, frozenset({EOS}))
    for text in "abcab":
        few.matcher(StructuredOutputsParams(regex=text))
    assert [text for _, text in few._compiled] == ["a", "b"]
