"""StructuredOutputsParams: checked where it comes in."""

import pytest

from jpaged.errors import InvalidRequestError
from jpaged.structured import StructuredOutputsParams


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json": {}}, "exactly one"),
        ({"regex": ""}, "regex takes text"),
        ({"regex": 5}, "regex takes text"),
        ({"regex": "a" * 5000}, "regex takes text"),
        ({"regex": "\ud800"}, "not valid Unicode"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": "[]"}, "must be a JSON schema"),
        ({"json": []}, "must be a JSON schema"),
        ({"json": {"const": object()}}, "not a JSON schema"),
        ({"json": {"const": float("nan")}}, "not a JSON schema"),
        ({"json": nested(49)}, "nested deeper"),
        ({"json": "[" * 50_000}, "not a JSON schema"),
        ({"json": {"description": "x" * 70_000}}, "json takes text"),
        ({"choice": []}, "choice must be"),
        ({"choice": "yes"}, "choice must be"),
        ({"choice": ["a", 1]}, "choice takes text"),
        ({"choice": ["a"] * 1025}, "choice must be"),
        ({"grammar": "x" * 40_000}, "grammar takes text"),
        ({"json_object": False}, "json_object is True"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        StructuredOutputsParams(**arguments)


def test_a_schema_is_kept_as_text():
    schema = {"type": "string"}
    params = StructuredOutputsParams(json=schema)
    schema["type"] = "integer"
    assert params == StructuredOutputsParams(json='{"type": "string"}')
    assert (params.kind, hash(params)) == ("json", hash(StructuredOutputsParams(json={"type": "string"})))
