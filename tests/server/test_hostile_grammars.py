"""Schemas, expressions and grammars that are made to hang or to explode, while sixteen good streams go on."""

import concurrent.futures

import pytest

from jpaged.structured import trials
from tests.structured.test_grammars import HANGING, HOSTILE

C, CHAT = "/v1/completions", "/v1/chat/completions"
SPENT = [
    {"json": {"anyOf": [{"const": i} for i in range(3500)]}},
    {"regex": "((((((a{0,99}){0,99}){0,99}){0,99}){0,99}){0,99})"},
    {"regex": "a{1000000000}"},
    {"grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(400)) + '\na400: "x"'},
    {"grammar": 'start: (("a"{0,1000}){0,1000}){0,1000}'},
]
"""These compile; a step of some of them is too much, which ends that request alone."""


@pytest.mark.parametrize("form", HOSTILE, ids=lambda form: str(form)[:50])
def test_what_cannot_be_compiled_is_refused(live, good, form):
    answer = live.post(C, prompt="a", structured_outputs=form)
    assert answer.status_code == 400
    assert "structured_outputs" in answer.json()["error"]["message"]


@pytest.mark.parametrize("form", SPENT, ids=lambda form: str(form)[:50])
def test_what_explodes_later_ends_alone(live, good, form):
    answer = live.post(C, prompt="a", max_tokens=30, temperature=1, structured_outputs=form)
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length", "error")


def test_what_hangs_is_given_up_and_delays_nobody(live, good, monkeypatch):
    """More requests hang than there are processes. Others get their answers before any of those does."""
    monkeypatch.setattr(trials, "SECONDS", 60.0)
    assert live.post(C, prompt="a", structured_outputs={"regex": "[ab]{3}"}).status_code == 200
    [schema] = [form["json"] for form in HANGING if "json" in form]
    bodies = [{"prompt": "a", "structured_outputs": {"json": schema | {"title": str(i)}}} for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        hanging = [pool.submit(live.http.post, C, json=body) for body in bodies]
        while live.llm.engine.grammars._compiler.trials._free._value:
            assert not any(one.done() for one in hanging)
        texts = [live.post(C, prompt=f"{i} tokenised", max_tokens=4, ignore_eos=True) for i in range(8)]
        known = live.post(C, prompt="a", max_tokens=9, structured_outputs={"regex": "[ab]{3}"})
        choice = live.post(C, prompt="a", max_tokens=9, structured_outputs={"choice": ["ab", "cd"]})
        assert [text.json()["usage"]["completion_tokens"] for text in texts] == [4] * 8
        assert known.json()["choices"][0]["finish_reason"] == "stop"
        assert choice.json()["choices"][0]["text"] in ("ab", "cd")
        assert live.http.get("/health").status_code == 200
        assert not any(one.done() for one in hanging)
        monkeypatch.setattr(trials, "SECONDS", 0.5)  # for those that wait for a process
        live.llm.engine.end_compiling()
        statuses = {one.result().status_code for one in hanging}
    assert statuses <= {400, 500}


@pytest.mark.parametrize("form", HANGING, ids=lambda form: str(form)[:50])
def test_what_hangs_is_told_so(live, good, form, monkeypatch):
    monkeypatch.setattr(trials, "SECONDS", 1.0)
    answer = live.post(C, prompt="a", structured_outputs=form)
    assert answer.status_code == 400
    assert "longer than 1 s" in answer.json()["error"]["message"]


def test_a_tools_schema_is_a_grammar_too(live, good, monkeypatch):
    monkeypatch.setattr(trials, "SECONDS", 1.0)
    [schema] = [form["json"] for form in HANGING if "json" in form]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    answer = live.post(CHAT, messages=[{"role": "user", "content": "a"}], tools=[tool], tool_choice="required")
    assert answer.status_code == 400
