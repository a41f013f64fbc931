"""Tool calls: from what a model writes to OpenAI's `tool_calls`.

A call is given out when it is complete; text before it goes through as it comes, but for what may yet turn out to be
the beginning of a call.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Call = tuple[str, dict[str, Any]]
"""(function's name, arguments)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a family of models writes calls."""

    begins: tuple[str, ...]
    """What a call begins with."""
    only_at_start: bool
    """Whether a call can only be the whole answer."""
    parse: Callable[[str], list[Call] | None]
    """The calls in a complete text that begins with one; None: it is none, after all."""
    special_tokens: bool
    """Whether what a call begins with may be a special token, which must then not be left out of the text."""


class CallParser:
    """Follows one answer."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._held = ""
        self._in_call = False
        self._begun = False

    def push(self, text: str) -> str:
        """Adds text; returns what of it is not part of a call, as far as that is known."""
        self._held += text
        if self._in_call:
            return ""
        form = self._form
        if form.only_at_start and self._begun:
            return self._give(len(self._held))
        stripped = self._held.lstrip()
        if form.only_at_start:
            if any(stripped.startswith(begin) for begin in form.begins):
                self._in_call = True
                return ""
            may_begin = not stripped or any(begin.startswith(stripped) for begin in form.begins)
            return "" if may_begin else self._give(len(self._held))
        found = [at for begin in form.begins if (at := self._held.find(begin)) >= 0]
        if found:
            self._in_call = True
            return self._give(min(found))
        return self._give(len(self._held) - _open_end(self._held, form.begins))

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(text that was held back and is no call, the calls)."""
        held, self._held = self._held, ""
        calls = self._form.parse(held.strip()) if self._in_call else None
        if not calls:
            return held, []
        return "", [_tool_call(i, name, arguments) for i, (name, arguments) in enumerate(calls)]

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self._begun = self._begun or bool(given)
        return given


def _open_end(text: str, begins: tuple[str, ...]) -> int:
    """How many last characters may be the beginning of a call."""
    most = max(len(begin) for begin in begins) - 1
    return next((n for n in range(min(most, len(text)), 0, -1) if any(b.startswith(text[-n:]) for b in begins)), 0)


def _tool_call(index: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _call_of(value: Any) -> Call | None:
    """A call from {"name": ..., "arguments" or "parameters": {...}}."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _all_or_none(values: list[Any]) -> list[Call] | None:
    calls = [_call_of(value) for value in values]
    return None if not calls or None in calls else calls  # type: ignore[return-value]


def _hermes(text: str) -> list[Call] | None:
    """<tool_call>{...}</tool_call>, once or more; the last may lack its end."""
    bodies = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL)
    return _all_or_none([_json(body) for body in bodies])


def _llama3(text: str) -> list[Call] | None:
    """<|python_tag|>{...}; {...}, with or without the tag."""
    text = text.removeprefix("<|python_tag|>").strip()
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        while at < len(text) and text[at] in "; \n":
            at += 1
    return _all_or_none(values)


def _mistral(text: str) -> list[Call] | None:
    """[TOOL_CALLS][{...}, {...}], or [TOOL_CALLS]name{...} once or more."""
    parts = [part.strip() for part in text.split("[TOOL_CALLS]") if part.strip()]
    if len(parts) == 1 and parts[0].startswith("["):
        values = _json(parts[0])
        return _all_or_none(values) if isinstance(values, list) else None
    named = [re.fullmatch(r"([\w.-]+)(?:\[ARGS\])?\s*(\{.*\})", part, re.DOTALL) for part in parts]
    return _all_or_none([m and {"name": m[1], "arguments": _json(m[2])} for m in named])


def _required(text: str) -> list[Call] | None:
    """[{"name": ..., "parameters": {...}}, ...], by a grammar."""
    values = _json(text)
    return _all_or_none(values) if isinstance(values, list) else None


def named(name: str) -> Format:
    """The arguments of one function alone, by a grammar."""

    def parse(text: str) -> list[Call] | None:
        return _all_or_none([{"name": name, "arguments": _json(text)}])

    return Format(begins=("",), only_at_start=True, parse=parse, special_tokens=False)


def schema_of_call(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments."""
    return tool.get("parameters") or {"type": "object"}


def schema_of_calls(tools: Iterable[Mapping[str, Any]], most: int) -> dict[str, Any]:
    """The JSON schema of 1 to `most` calls of these functions."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "parameters": schema_of_call(tool)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}


REQUIRED = Format(begins=("",), only_at_start=True, parse=_required, special_tokens=False)
FORMATS = {
    "hermes": Format(begins=("<tool_call>",), only_at_start=False, parse=_hermes, special_tokens=False),
    "llama3_json": Format(begins=("<|python_tag|>", '{"name"'), only_at_start=True, parse=_llama3, special_tokens=True),
    "mistral": Format(begins=("[TOOL_CALLS]",), only_at_start=False, parse=_mistral, special_tokens=True),
}
