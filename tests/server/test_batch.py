"""Batch files through a live server: a result for every line, errors with the line that they are about, and a run that was
cut off anywhere goes on without doing anything twice."""

import asyncio
import json

import httpx2 as httpx
import pytest

from jpaged.errors import EngineDeadError, InvalidConfigError
from jpaged.server.batch import Counts, ResultFile, run_batch

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 6}
CHAT, COMPLETIONS, EMBEDDINGS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score"
REQUESTS = [
    *((f"chat {i}", CHAT, {**GREEDY, "messages": [{"role": "user", "content": f"Hello {i}"}]}) for i in range(3)),
    *((f"completion {i}", COMPLETIONS, {**GREEDY, "prompt": f"Once {i}"}) for i in range(3)),
    ("embedding", EMBEDDINGS, {"input": ["a", "b"]}),
    ("score", SCORE, {"prompts": "a", "completions": ["b"]}),
    ("too long", COMPLETIONS, {**GREEDY, "prompt": [3] * 300}),
    ("no such model", EMBEDDINGS, {"input": "a", "model": "gpt-4"}),
]
LINES = [json.dumps({"custom_id": i, "method": "POST", "url": url, "body": body}) for i, url, body in REQUESTS]
BAD_LINES = [
    "{",
    "[]",
    '{"custom_id": "x", "url": "/v1/completions"}',
    json.dumps({"custom_id": "x", "url": "/v1/files", "body": {}}),
    json.dumps({"custom_id": "x", "method": "GET", "url": COMPLETIONS, "body": {}}),
    json.dumps({"custom_id": "chat 0", "url": COMPLETIONS, "body": {}}),
    json.dumps({"custom_id": "x", "url": COMPLETIONS, "body": {"prompt": "a", "stream": True}}),
]


def run(url, source, target, max_concurrency=4) -> Counts:
    async def main() -> Counts:
        with ResultFile(target) as results:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                return await run_batch(client, source, results, max_concurrency=max_concurrency)

    return asyncio.run(main())


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(results: list[dict]) -> dict:
    """By custom_id, or by the number of a line without: what each result says, without what is new in every run."""
    found = {}
    for result in results:
        key = result["custom_id"] if result["custom_id"] is not None else result["error"]["line"]
        assert key not in found, "a line has one result"
        response = result["response"]
        found[key] = result["error"] if response is None else _lasting(response["body"])
    return found


def _lasting(body):
    """Without numbers of embeddings and scores, whose last bits depend on what else runs."""
    if isinstance(body, dict):
        return {key: _lasting(value) for key, value in body.items() if key not in ("id", "created")}
    return [_lasting(each) for each in body] if isinstance(body, list) else None if isinstance(body, float) else body


@pytest.fixture(scope="module")
def batch(live, tmp_path_factory):
    """(the source, its results by one run)"""
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join([*LINES, "", *BAD_LINES]) + "\n")
    counts = run(live.url, source, target)
    assert counts == Counts(done=len(LINES) + len(BAD_LINES), failed=2 + len(BAD_LINES))
    return source, target


def test_results_are_what_the_server_answers(live, batch):
    results = read(batch[1])
    answers = said(results)
    for custom_id, url, body in REQUESTS:
        answer = live.post(url, **body)
        [result] = [result for result in results if result["custom_id"] == custom_id]
        assert result["response"]["status_code"] == answer.status_code
        assert answers[custom_id] == _lasting(answer.json())
        assert (result["error"] is None) == (answer.status_code == 200)
        assert result["id"].startswith("batch_req_")
        assert result["response"]["request_id"]
    errors = {result["custom_id"]: result["error"] for result in results if result["error"]}
    assert errors["too long"]["code"] == "context_length_exceeded"
    assert errors["no such model"]["code"] == "model_not_found"


def test_lines_that_are_no_requests_have_errors_with_their_numbers(batch):
    refused = [result["error"] for result in read(batch[1]) if result["custom_id"] is None]
    first = len(LINES) + 2  # after the empty one
    assert [error["line"] for error in refused] == list(range(first, first + len(BAD_LINES)))
    for error, says in zip(refused, ("JSON", "dict", "body", "url", "method", "earlier line", "stream"), strict=True):
        assert error["code"] == "invalid_line"
        assert says in error["message"]


def test_a_run_that_was_cut_off_anywhere_goes_on(live, batch, tmp_path):
    """Cut between two lines, inside one, and just before its end."""
    source, whole = batch
    content, target = whole.read_bytes(), tmp_path / "out.jsonl"
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in (0, 1, ends[0], ends[3] - 1, ends[3], ends[5] + 40, ends[-2], ends[-1] - 1, ends[-1]):
        target.write_bytes(content[:cut])
        counts = run(live.url, source, target)
        assert target.read_bytes().startswith(content[: max([0, *(end for end in ends if end <= cut)])])
        assert said(read(target)) == said(read(whole))
        assert counts.skipped == sum(end <= cut for end in ends)
        assert counts.done + counts.skipped == len(ends)


def test_no_more_at_once_than_allowed(live, tmp_path):
    source, most = tmp_path / "in.jsonl", []
    body = {**GREEDY, "prompt": "a", "max_tokens": 30, "ignore_eos": True}
    lines = [json.dumps({"custom_id": str(i), "url": COMPLETIONS, "body": body}) for i in range(12)]
    source.write_text("\n".join(lines))
    live.llm.on_outputs.append(lambda outputs: most.append(live.llm.num_unfinished_requests))
    try:
        assert run(live.url, source, tmp_path / "out.jsonl", max_concurrency=3).done == 12
    finally:
        live.llm.on_outputs.pop()
    assert max(most) == 3


def test_a_server_that_is_gone_writes_no_results(live, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(LINES))
    with pytest.raises(EngineDeadError, match="the server is gone"):
        run("http://127.0.0.1:9", source, target)
    assert target.read_bytes() == b""
    with pytest.raises(InvalidConfigError, match="No such file"):
        run(live.url, tmp_path / "none", target)
    target.write_text('{"some": "thing"}\n')
    with pytest.raises(InvalidConfigError, match="no result of a batch"):
        run(live.url, source, target)
    assert target.read_text() == '{"some": "thing"}\n'
