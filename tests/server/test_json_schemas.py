"""Outputs for random JSON schemas, each asked for in another way, are valid. The real model has many more of them:
`python -m benchmarks.soak.json_schemas`."""

from benchmarks.soak.json_schemas import ask_all, problems, schemas


def test_every_output_is_valid(live):
    def post(path, body):
        answer = live.http.post(path, json=body)
        return answer.status_code, answer.json()

    report = ask_all(post, schemas(30, seed=1, depth=1), max_tokens=200, at_once=8)
    assert report.refused == report.invalid == []
    assert report.outputs == 42
    # A model that knows nothing likes to indent; some of its outputs come to their length before their end.
    assert report.reasons["stop"] >= 30


def test_a_wrong_output_is_noticed():
    schema = {"type": "array", "items": {"type": "integer", "maximum": 3}, "maxItems": 2}
    assert list(problems(schema, "[1, 2]")) == []
    assert all(list(problems(schema, text)) for text in ("[1, 2, 3]", "[4]", "[1", "{}"))
    dates = {"type": "string", "format": "date"}
    assert list(problems(dates, '"0000-02-29"')) == []
    assert all(list(problems(dates, text)) for text in ('"0000-02-30"', '"2023-02-29"', '"2023"'))
