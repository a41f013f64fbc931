"""Grammars and matchers over real tokenizers: what they allow, what they refuse."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jpaged.errors import InvalidRequestError, QueueFullError
from jpaged.structured import Grammars, StructuredOutputsParams, compiling, grammars, trials

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
    {"regex": "(" * 200 + "a" + ")*" * 200},
    {"json": {"$ref": "#"}},
    {"json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}, "$ref": "#/$defs/a"}},
    {"json": {"$ref": "http://example.com/schema"}},
    {"json": {"type": "florp"}},
    {"json": {"type": "array", "uniqueItems": True}},
    {"json": {"allOf": [{"anyOf": [{"required": [f"p{i}"]}, {"required": [f"q{i}"]}]} for i in range(16)]}},
    {"json": {"type": "integer", "multipleOf": 999_999_937}},
    {"json": {"type": "string", "allOf": [{"pattern": f".*{c}.{{30}}$"} for c in "abcdefghij"]}},
    {"json": {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(10_000)]}},
    {"grammar": "start: nobody"},
    {"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000},
    {"grammar": "start: T\nT: " + " & ".join(f"/(a{{{p}}})+/" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))},
    {"grammar": 'start: start "a"'},
    {
        "grammar": "start: "
        + "|".join(f"a{i}" for i in range(200))
        + "\n"
        + "\n".join(f"a{i}: /[a-z]/ start | /[a-z]/" for i in range(200))
    },
]


WITH_A_REAL_VOCABULARY = [
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}},
    {"grammar": "start: T\nT: " + " & ".join(f"~/.*{c}.{{20}}/" for c in "abcdefghijklmnop")},
]


@pytest.mark.parametrize("arguments", HOSTILE + WITH_A_REAL_VOCABULARY, ids=lambda a: str(a)[:40])
def test_what_cannot_be_served_is_refused(compiled, arguments):
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        compiled.matcher(StructuredOutputsParams(**arguments))


HANGING = [
    {"json": {"type": "string", "allOf": [{"pattern": f"(.*[^a]){{{i}}}"} for i in range(2, 40)]}},
    {"grammar": "start: T\nT: " + " & ".join(f"/(.*[^a]){{{i}}}.*/" for i in range(2, 40))},
]
"""Schemas and grammars on which llguidance is busy for minutes, whatever its limits."""


@pytest.mark.parametrize("arguments", HANGING, ids=lambda a: str(a)[:40])
def test_a_compilation_that_does_not_end_is_ended(compiled, monkeypatch, arguments):
    monkeypatch.setattr(trials, "SECONDS", 2.0)
    with pytest.raises(InvalidRequestError, match="longer than 2 s"):
        compiled.matcher(StructuredOutputsParams(**arguments))
    monkeypatch.undo()
    assert compiled.matcher(StructuredOutputsParams(regex="later" + "!" * len(str(arguments)))).error is None
    processes = compiled._compiler.trials._processes
    assert [process.poll() for process in processes] == [None], "the one that hung is gone, another is there"


def test_a_compilation_that_takes_the_memory_is_ended(smollm2_tokenizer, monkeypatch, tmp_path):
    """The limit, set so low that the first grammar exceeds it."""
    program = Path(compiling.__file__).read_text()
    (tmp_path / "small.py").write_text(program.replace("_answer(None)", "bytearray(MAX_MEMORY)"))
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "small.py"))
    few = Grammars(smollm2_tokenizer, V, frozenset({EOS}))
    with pytest.raises(InvalidRequestError, match="2 GiB"):
        few.matcher(StructuredOutputsParams(regex="abc"))


def test_a_grammar_that_many_ask_for_at_once_is_compiled_once(smollm2_tokenizer):
    few = Grammars(smollm2_tokenizer, V, frozenset({EOS}))
    params = StructuredOutputsParams(regex="[a-z]{1,9}@[a-z]{1,9}")
    with ThreadPoolExecutor(16) as pool:
        matchers = list(pool.map(few.matcher, [params] * 16))
    assert len({id(matcher._matcher) for matcher in matchers}) == 16
    assert len(few._compiler.trials._processes) == 1
    assert params in few


def test_when_every_process_is_busy_others_may_come_later(compiled, monkeypatch):
    """Four hang; a fifth is told to come again, and what needs no trial is served."""
    compiled.matcher(StructuredOutputsParams(regex="warm"))
    hanging = [HANGING[0]["json"] | {"title": str(i)} for i in range(trials.MAX_PROCESSES)]
    with ThreadPoolExecutor(trials.MAX_PROCESSES) as pool:
        busy = [pool.submit(compiled.matcher, StructuredOutputsParams(json=schema)) for schema in hanging]
        while compiled._compiler.trials._free._value:
            assert not any(one.done() for one in busy)
        monkeypatch.setattr(trials, "SECONDS", 0.1)
        with pytest.raises(QueueFullError, match="later"):
            compiled.matcher(StructuredOutputsParams(regex="other"))
        assert compiled.matcher(StructuredOutputsParams(choice=["a", "b"])).error is None
        compiled.close()
        assert all(one.exception() is not None for one in busy)


@pytest.mark.parametrize(
    "regex",
    [
        "((((((a{0,99}){0,99}){0,99}){0,99}){0,99}){0,99})",
        "a{1000000000}",
        "(a|b)*a(a|b){3000}",
        "".join(f".{{0,50}}{c}" for c in "abcdefghij" * 10),
        r"(\w{1,100}\W{1,100}){1,100}",
    ],
    ids=lambda r: r[:30],
)
def test_hostile_expressions_end_in_a_text_or_an_error(compiled, regex):
    """What compiles at once may explode later: each mask stays within the limits of a step."""
    matcher, output, rng = compiled.matcher(StructuredOutputsParams(regex=regex)), [], random.Random(0)
    for _ in range(200):
        allowed = tokens_of(matcher)
        if matcher.error is not None or allowed == [EOS]:
            break
        output.append(rng.choice([t for t in allowed if t != EOS]))
        matcher.advance(output)


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
