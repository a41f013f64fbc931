"""StructuredOutputsParams: the form that a request's output must have. Names are vLLM's."""

import dataclasses
import json as json_text
from typing import Any

from jpaged.errors import InvalidRequestError

MAX_SCHEMA = 1 << 16
MAX_SCHEMA_DEPTH = 48
MAX_REGEX = 4096
MAX_GRAMMAR = 1 << 15
MAX_CHOICES = 1024
MAX_CHOICE = 1024
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output: exactly one of the fields is given.

    Raises:
      InvalidRequestError: none or several are given, or one is not of its type or too large.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as a dict or as text; kept as text. At most 64 KiB, 48 levels deep."""
    regex: str | None = None
    """A regular expression that the whole output matches, in the syntax of Rust's regex crate,
    without anchors; its digit class is ASCII. At most 4,096 characters."""
    choice: list[str] | tuple[str, ...] | None = None
    """The output is one of these strings; at most 1,024, each of at most 1,024 characters."""
    grammar: str | None = None
    """A context-free grammar: Lark, or GBNF; 32 KiB."""
    json_object: bool | None = None
    """True: the output is any JSON object."""

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs takes exactly one of {', '.join(KINDS)}, not {', '.join(given) or 'none'}."
            )
        getattr(self, f"_check_{given[0]}")()

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """The constraint as text; with `kind`, what it is known by."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_text.dumps(value)

    def _check_json(self) -> None:
        schema, text = self.json, self.json
        try:
            if isinstance(text, str):
                _bounded("json", text, MAX_SCHEMA)
                schema = json_text.loads(text)
            else:
                text = json_text.dumps(schema, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequestError(f"structured_outputs.json is not a JSON schema: {error}") from error
        _bounded("json", text, MAX_SCHEMA)
        if not isinstance(schema, dict):
            raise InvalidRequestError("structured_outputs.json must be a JSON schema: an object, or its text.")
        if _deeper_than(schema, MAX_SCHEMA_DEPTH):
            raise InvalidRequestError(f"structured_outputs.json is nested deeper than {MAX_SCHEMA_DEPTH} levels.")
        object.__setattr__(self, "json", text)  # __post_init__ of a frozen dataclass: normalising its own field

    def _check_regex(self) -> None:
        _bounded("regex", self.regex, MAX_REGEX)

    def _check_grammar(self) -> None:
        _bounded("grammar", self.grammar, MAX_GRAMMAR)

    def _check_choice(self) -> None:
        if not isinstance(self.choice, list | tuple) or not 1 <= len(self.choice) <= MAX_CHOICES:
            raise InvalidRequestError(f"structured_outputs.choice must be a list of 1 to {MAX_CHOICES} strings.")
        for one in self.choice:
            _bounded("choice", one, MAX_CHOICE)
        object.__setattr__(self, "choice", tuple(self.choice))

    def _check_json_object(self) -> None:
        if self.json_object is not True:
            raise InvalidRequestError("structured_outputs.json_object is True or not given.")


def _bounded(name: str, text: Any, most: int) -> None:
    if not isinstance(text, str) or not 1 <= len(text) <= most:
        raise InvalidRequestError(f"structured_outputs.{name} takes text of 1 to {most} characters.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates can't be written as UTF-8
        raise InvalidRequestError(f"structured_outputs.{name} is not valid Unicode: {error.reason}.") from error


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(one, levels - 1) for one in inside)
