"""Random JSON schemas through a live server: every output that it gives must be valid.

    python -m benchmarks.soak.json_schemas [MODEL] [--schemas 200] [--seed 0]

Schemas are bounded, so that outputs end. Each is asked for in one of several ways: as a chat's `response_format` or as
`structured_outputs`, greedily or sampled, two samples of a prompt, or beams. Prints JSON; the exit status is 1 if an
output was not valid, or was cut off.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import random
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema

from benchmarks.soak.streams import serving

Schema = dict[str, Any]
_NAMES = (
    "name",
    "id",
    "tags",
    "city",
    "émile",
    "a b",
    "x",
    'quote"d',
    "price",
    "when",
    "is_open",
    "items",
    "back\\slash",
)
_WORDS = ("red", "green", "blue", "ünïcode", "line\nbreak", "", 'a "quote"', "tab\t", "😀", "null", "true", "0")
_PATTERNS = (
    "^[a-z]{1,8}$",
    "^[A-Z][a-z]{0,5}( [A-Z][a-z]{0,5})?$",
    r"^\d{3}-\d{4}$",
    "^(yes|no|maybe)$",
    "^#[0-9a-f]{6}$",
)
_FORMATS = ("date", "uuid", "ipv4")
"""Not those of times: the validator takes no more than six digits of a second, and RFC 3339 has no limit."""


_FORMAT_CHECKER = jsonschema.FormatChecker()


@_FORMAT_CHECKER.checks("date", raises=ValueError)
def _is_date(value: object) -> bool:
    """RFC 3339 knows a year 0, a leap year; Python does not."""
    if isinstance(value, str):
        datetime.date.fromisoformat(f"2000{value[4:]}" if value.startswith("0000-") else value)
    return True


class Schemas:
    """Makes them up.

    Args:
      dice: of everything that is random.
      depth: most levels of arrays and objects within each other.
    """

    def __init__(self, dice: random.Random, depth: int) -> None:
        self._dice, self._depth = dice, depth
        self._defs: dict[str, Schema] = {}

    def one(self) -> Schema:
        """A schema of its own, with definitions that it may refer to."""
        self._defs = {}
        if self._dice.random() < 0.3:
            self._defs["thing"] = self._object(1)
        schema = self._dice.choice((self._object, self._object, self._array, self._any))(self._depth)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": self._defs, **schema}

    def _any(self, depth: int) -> Schema:
        simple = (self._string, self._integer, self._number, self._constant, self._simple, self._union)
        nested = (self._object, self._array, self._tuple, self._reference)
        return self._dice.choice(simple + (nested if depth > 0 else ()))(depth)

    def _string(self, depth: int) -> Schema:
        low = self._dice.randint(0, 3)
        return self._dice.choice(
            (
                {"type": "string", "minLength": low, "maxLength": low + self._dice.randint(0, 9)},
                {"type": "string", "pattern": self._dice.choice(_PATTERNS)},
                {"type": "string", "format": self._dice.choice(_FORMATS)},
                {"type": "string", "enum": self._dice.sample(_WORDS, 3)},
            )
        )

    def _integer(self, depth: int) -> Schema:
        low = self._dice.randint(-2000, 2000)
        bounds = self._dice.choice(
            (
                {"minimum": low, "maximum": low + self._dice.randint(0, 5000)},
                {"exclusiveMinimum": low, "exclusiveMaximum": low + self._dice.randint(2, 300)},
                {"minimum": 0, "maximum": 999, "multipleOf": self._dice.choice((2, 5, 7, 10))},
            )
        )
        return {"type": "integer", **bounds}

    def _number(self, depth: int) -> Schema:
        low, part = self._dice.randint(-50, 50), self._dice.choice((0.25, 0.5, 0.125))
        # Without a part to be a multiple of, a model may write digits without end.
        return {"type": "number", "minimum": low, "maximum": low + self._dice.choice((1, 0.5, 99)), "multipleOf": part}

    def _constant(self, depth: int) -> Schema:
        values = (*_WORDS, 7, -0.5, True, None, [1, "two"], {"three": []})
        one = self._dice.sample(values, 3)
        return self._dice.choice(({"const": one[0]}, {"enum": one}))

    def _simple(self, depth: int) -> Schema:
        return {"type": self._dice.choice(("boolean", "null", ["boolean", "null"]))}

    def _union(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._dice.randint(2, 3))]}

    def _reference(self, depth: int) -> Schema:
        return {"$ref": "#/$defs/thing"} if "thing" in self._defs else self._simple(depth)

    def _array(self, depth: int) -> Schema:
        low = self._dice.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth - 1),
            "minItems": low,
            "maxItems": low + self._dice.randint(0, 2),
        }

    def _tuple(self, depth: int) -> Schema:
        items = [self._any(depth - 1) for _ in range(self._dice.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _object(self, depth: int) -> Schema:
        names = self._dice.sample(_NAMES, self._dice.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": [name for name in names if self._dice.random() < 0.6],
            "additionalProperties": False,
        }


def schemas(count: int, seed: int, depth: int = 2) -> list[Schema]:
    """Random ones, each bounded."""
    maker = Schemas(random.Random(seed), depth)
    return [maker.one() for _ in range(count)]


def request_for(i: int, schema: Schema, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request for an output of that form."""
    ask = f"Answer with JSON, number {i}."
    chat = {"messages": [{"role": "user", "content": ask}], "max_tokens": max_tokens, "seed": i}
    chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    completion = {"prompt": ask, "max_tokens": max_tokens, "seed": i, "structured_outputs": {"json": schema}}
    return (
        ("/v1/chat/completions", chat | {"temperature": 0.0}),
        ("/v1/chat/completions", chat | {"temperature": 1.0}),
        ("/v1/completions", completion | {"temperature": 0.7, "n": 2}),
        ("/v1/completions", completion | {"temperature": 1.0, "top_p": 0.9}),
        ("/v1/completions", completion | {"temperature": 0.0, "use_beam_search": True, "n": 2}),
    )[i % 5]


@dataclasses.dataclass
class Report:
    """What became of the outputs."""

    outputs: int = 0
    tokens: int = 0
    reasons: Counter = dataclasses.field(default_factory=Counter)
    refused: list[str] = dataclasses.field(default_factory=list)
    """Schemas that the server does not take, and why."""
    invalid: list[str] = dataclasses.field(default_factory=list)

    def take(self, schema: Schema, status: int, answer: dict[str, Any]) -> None:
        if status != 200:
            self.refused.append(f"{status} {answer}: {json.dumps(schema)}")
            return
        self.tokens += answer["usage"]["completion_tokens"]
        for choice in answer["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            self.outputs += 1
            self.reasons[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop":
                self.invalid += [f"{problem}: {text!r}: {json.dumps(schema)}" for problem in problems(schema, text)]


def problems(schema: Schema, text: str) -> Iterator[str]:
    """What is wrong with an output."""
    try:
        value = json.loads(text)
    except ValueError as error:
        yield str(error)
        return
    checker = jsonschema.Draft202012Validator(schema, format_checker=_FORMAT_CHECKER)
    yield from (error.message for error in checker.iter_errors(value))


def ask_all(post: Callable[[str, dict], tuple[int, dict]], many: list[Schema], max_tokens: int, at_once: int) -> Report:
    """Asks for an output of each schema.

    Args:
      post: (path, body) -> (status, answer).
    """
    report = Report()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        asked = [pool.submit(post, *request_for(i, schema, max_tokens)) for i, schema in enumerate(many)]
        for schema, answered in zip(many, asked, strict=True):
            report.take(schema, *answered.result())
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serving(args.model, 16, []) as (url, _):

        def post(path: str, body: dict) -> tuple[int, dict]:
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=1800) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        report = ask_all(post, schemas(args.schemas, args.seed), args.max_tokens, 16)
    print(json.dumps(vars(report), indent=1))
    return 1 if report.invalid or report.refused or report.reasons["length"] else 0


if __name__ == "__main__":
    sys.exit(main())
