"""Tool calls: what models write, in whatever pieces it comes, becomes OpenAI's tool_calls."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.server.tools import FORMATS, CallParser

HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": "a</b>"}}\n</tool_call>'
CASES = [
    ("hermes", "no call at all, 1 < 2", "no call at all, 1 < 2", []),
    ("hermes", HERMES, "", [("f", {"x": "a</b>"})]),
    ("hermes", f"I look.\n{HERMES}\n{HERMES}", "I look.\n", [("f", {"x": "a</b>"})] * 2),
    ("hermes", HERMES.removesuffix("</tool_call>"), "", [("f", {"x": "a</b>"})]),
    ("hermes", "see <tool_call>{not json}</tool_call>", "see <tool_call>{not json}</tool_call>", []),
    ("hermes", "it ends in <tool", "it ends in <tool", []),
    ("llama3_json", '{"name": "g", "parameters": {"y": 1}}', "", [("g", {"y": 1})]),
    ("llama3_json", '<|python_tag|>{"name": "g", "parameters": {}}; {"name": "h", "parameters": {"z": [2]}}', "",
     [("g", {}), ("h", {"z": [2]})]),
    ("llama3_json", '{"name": "cut', '{"name": "cut', []),
    ("llama3_json", '{"other": 1}', '{"other": 1}', []),
    ("llama3_json", 'Text, then {"name": "g", "parameters": {}}', 'Text, then {"name": "g", "parameters": {}}', []),
    ("mistral", '[TOOL_CALLS][{"name": "m", "arguments": {"a": true}}]', "", [("m", {"a": True})]),
    ("mistral", '[TOOL_CALLS]m{"a": 1}[TOOL_CALLS]k[ARGS]{"b": 2}', "", [("m", {"a": 1}), ("k", {"b": 2})]),
    ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    ("hermes", "<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
]  # fmt: skip


def parse(name, pieces):
    parser = CallParser(FORMATS[name])
    text = "".join(parser.push(piece) for piece in pieces)
    rest, calls = parser.finish()
    return text + rest, [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_of_every_family(name, text, content, calls):
    assert parse(name, [text]) == (content, calls)


@given(st.sampled_from(CASES[:-1]), st.lists(st.integers(1, 9), max_size=40))
def test_pieces_do_not_matter(case, cuts):
    name, text, content, calls = case
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    assert parse(name, [*pieces, text[at:]]) == (content, calls)


def test_text_is_not_held_back_without_need():
    parser = CallParser(FORMATS["hermes"])
    assert parser.push("hello <to") == "hello "
    assert parser.push("p>") == "<top>"


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_conversation_with_tools(with_tools):
    """The tiny model writes no calls; what goes to it and what becomes of its text is as with any other."""
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    ]  # fmt: skip
    body = with_tools.post("/tokenize", messages=messages, tools=[TOOL]).json()
    text = with_tools.post("/detokenize", tokens=body["tokens"]).json()["prompt"]
    assert "weather;" in text
    assert "[weather Rome]" in text
    client, ask = with_tools.openai.chat.completions, {"model": "tiny", "messages": messages, "tools": [TOOL]}
    got = client.create(**ask, temperature=0, max_tokens=12)
    chunks = list(client.create(**ask, temperature=0, max_tokens=12, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == got.choices[0].message.content
    without = client.create(**ask, tool_choice="none", temperature=0, max_tokens=1)
    assert without.usage.prompt_tokens < got.usage.prompt_tokens


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORCED = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_calls_whatever_the_model(with_tools, choice, stream):
    """The tiny model has random weights: only the grammar makes it call."""
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [FORCED], "tool_choice": choice}
    got = with_tools.openai.chat.completions.create(
        **ask, parallel_tool_calls=False, max_tokens=150, seed=1, temperature=0.5, stream=stream
    )
    if stream:
        deltas = [chunk.choices[0] for chunk in got]
        assert deltas[-1].finish_reason == "tool_calls"
        calls = [call for one in deltas for call in one.delta.tool_calls or []]
    else:
        assert got.choices[0].finish_reason == "tool_calls"
        calls = got.choices[0].message.tool_calls
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo")


def test_response_format_through_the_client(with_tools):
    create = with_tools.openai.chat.completions.create
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60}
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    got = create(**ask, response_format=schema)
    assert json.loads(got.choices[0].message.content)["city"] in ("Rome", "Oslo")
    got = create(**ask, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert got.choices[0].message.content in ("yes", "no")
