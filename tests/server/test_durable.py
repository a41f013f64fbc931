"""Requests that outlive their connections and their server: names, owners, reattaching, and what is kept how long."""

import asyncio
import json
import time

import httpx2 as httpx
import pytest

from jpaged.async_engine import AsyncLLM
from jpaged.errors import SnapshotError
from jpaged.server.config import ServerConfig
from jpaged.server.durable import MAX_DEATHS, Durable
from jpaged.server.positions import Position, parse
from tests.server.conftest import TEMPLATE
from tests.server.support import serving
from tests.server.test_tools import FORCED

BODY = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0.9, "seed": 5, "ignore_eos": True}
NAME = {"X-Request-Id": "mine"}


def events_of(lines):
    """(id, data) of server-sent events."""
    event_id = None
    for line in lines:
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: ") and line != "data: [DONE]":
            yield event_id, json.loads(line[6:])


def read(live, method="GET", path="/v1/requests/mine", stop_after=None, stop_at=None, **request):
    """(texts by choice, token ids by choice, last event id, last data) of a stream, cut off after some events or
    tokens of the first choice."""
    texts, tokens, last, data = {}, {}, None, {}
    with live.http.stream(method, path, **request) as answer:
        assert answer.status_code == 200, answer.read()
        for count, (event_id, data) in enumerate(events_of(answer.iter_lines()), 1):
            last = event_id
            for choice in data.get("choices", ()):
                index = choice["index"]
                text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                texts[index] = texts.get(index, "") + text
                tokens[index] = tokens.get(index, []) + choice.get("token_ids", [])
            if count == stop_after or (stop_at is not None and len(tokens[0]) >= stop_at):
                break
    return texts, tokens, last, data


def post(live, body, headers=NAME, path="/v1/completions", **more):
    return read(live, "POST", path, json={**body, "stream": True, "return_token_ids": True}, headers=headers, **more)


def pause_at(live, count):
    """Stops the engine when a request has so many tokens."""

    def look(outputs):
        if any(len(output.outputs[0].token_ids) == count for output in outputs):
            live.llm._thread.paused = True  # on its own thread

    live.llm.on_outputs.append(look)


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """A server that keeps requests, shared by tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("kept")
    engine = tiny(enable_prefix_caching=False)
    with serving(engine, snapshot_dir=str(folder), enable_admin_endpoints=True, snapshot_interval=0) as server:
        yield server


@pytest.fixture(scope="module")
def want(kept):
    """(text, token ids) of BODY."""
    texts, tokens, _, _ = post(kept, BODY, headers={})
    return texts[0], tokens[0]


def test_a_stream_goes_on_where_it_was_cut_off(kept, want):
    for cut in (1, 2, 7, 30):
        first, tokens, last, _ = post(kept, BODY, stop_after=cut)
        assert tokens[0] == want[1][: len(tokens[0])]
        rest, more, _, data = read(kept, headers={"Last-Event-ID": last})
        assert first[0] + rest.get(0, "") == want[0]
        assert tokens[0] + more.get(0, []) == want[1]
        assert data["choices"][0]["finish_reason"] == "length"
        assert data["id"] == "cmpl-mine"
        by_char, _, _, _ = read(kept, params={"from_char": len(first[0])})
        assert by_char[0] == rest[0]
        again, tokens, last, _ = read(kept, path="/v1/requests/cmpl-mine")
        assert (again[0], tokens[0]) == want, "it may be read more than once"
        assert read(kept, headers={"Last-Event-ID": last})[0] == {0: ""}, "nothing is left"
        whole = kept.http.get("/v1/requests/mine", params={"stream": False}).json()
        assert (whole["choices"][0]["text"], whole["choices"][0]["token_ids"]) == want
        assert whole["usage"]["completion_tokens"] == 60
        assert kept.http.delete("/v1/requests/mine").json()["deleted"]
        assert kept.http.get("/v1/requests/mine").status_code == 404


def test_every_choice_goes_on_by_itself(kept):
    body = {**BODY, "prompt": ["a", "b"], "n": 2, "max_tokens": 20, "echo": True}
    whole, tokens, _, _ = post(kept, body, headers={})
    assert whole.keys() == {0, 1, 2, 3}
    for cut in (1, 5, 9):
        first, ids, last, _ = post(kept, body, stop_after=cut)
        rest, more, _, _ = read(kept, headers={"Last-Event-ID": last})
        assert {index: first.get(index, "") + rest.get(index, "") for index in whole} == whole
        assert {index: ids.get(index, []) + more.get(index, []) for index in whole} == tokens
        kept.http.delete("/v1/requests/mine")


def test_the_same_post_again_is_the_same_request(kept, want):
    steps = kept.llm.engine.times.steps
    post(kept, BODY, stop_after=3)
    texts, tokens, _, data = post(kept, BODY)
    assert (texts[0], tokens[0], data["id"]) == (*want, "cmpl-mine")
    assert kept.llm.engine.times.steps - steps < 75, "it was computed once"
    other = kept.http.post("/v1/completions", json={**BODY, "seed": 6}, headers=NAME)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "request_exists")
    kept.http.delete("/v1/requests/mine")
    assert kept.http.post("/v1/completions", json={**BODY, "seed": 6}, headers=NAME).status_code == 200
    kept.http.delete("/v1/requests/mine")


def test_who_is_not_named_ends_with_its_connection(kept):
    kept.post("/pause")
    with kept.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}):
        assert kept.llm.num_unfinished_requests == 1
    while kept.llm.num_unfinished_requests:
        time.sleep(0.01)
    kept.post("/resume")
    assert kept.durable._entries == {}


def test_deleting_ends_a_request(kept):
    kept.post("/pause")
    with kept.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}, headers=NAME):
        pass
    assert kept.llm.num_unfinished_requests == 1, "it outlives its connection"
    assert kept.http.delete("/v1/requests/mine").status_code == 200
    while kept.llm.num_unfinished_requests:
        time.sleep(0.01)
    kept.post("/resume")


def test_an_aborted_one_says_so(kept):
    kept.post("/pause")
    with kept.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}, headers=NAME):
        kept.post("/abort_requests", request_ids=["cmpl-mine"])
    kept.post("/resume")
    assert kept.http.get("/v1/requests/mine", params={"stream": False}).json()["error"]["code"] == "aborted"
    kept.http.delete("/v1/requests/mine")


@pytest.mark.parametrize(
    "headers", [{"Last-Event-ID": text} for text in ("x", "0:1", "0:1.2,", "0:1.2;1:1.1", "-1:1.1", "0:1.2" * 999)]
)
def test_what_no_event_was_called_is_refused(kept, headers):
    post(kept, {**BODY, "max_tokens": 1})
    assert kept.http.get("/v1/requests/mine", headers=headers).status_code == 400
    for params in ({"from_char": -1}, {"stream": "maybe"}):
        assert kept.http.get("/v1/requests/mine", params=params).status_code == 400
    kept.http.delete("/v1/requests/mine")


def test_event_ids_are_read_as_they_are_written():
    assert parse("0:12.57,1:9.40e", None) == {0: Position(12, 57), 1: Position(9, 40, True)}
    assert parse(None, 7) == {0: Position(0, 7)}
    assert parse("", 0) == {}


def test_a_request_is_its_keys_own(tiny, tmp_path):
    engine = tiny(enable_prefix_caching=False)
    with serving(engine, "one", api_key=("one", "two"), snapshot_dir=str(tmp_path)) as live:
        post(live, BODY)
        other = {"Authorization": "Bearer two"}
        for name in ("mine", "cmpl-mine"):
            assert live.http.get(f"/v1/requests/{name}", headers=other).status_code == 404
            assert live.http.delete(f"/v1/requests/{name}", headers=other).status_code == 404
        assert live.http.post("/v1/completions", json=BODY, headers={**NAME, **other}).status_code == 409
        assert live.http.get("/v1/requests/mine").status_code == 200
    assert b"Bearer" not in (journal := b"".join(p.read_bytes() for p in tmp_path.glob("journal-*")))
    assert b'"one"' not in journal


def test_results_are_kept_for_a_while_and_not_too_many(tiny, tmp_path):
    engine = tiny(enable_prefix_caching=False)
    with serving(engine, snapshot_dir=str(tmp_path), max_kept_results=2, result_ttl=10000) as live:
        for name in ("a", "b", "c"):
            post(live, {**BODY, "max_tokens": 3}, headers={"X-Request-Id": name})
        live.durable.expire(time.time())
        assert [live.http.get(f"/v1/requests/{name}").status_code for name in "abc"] == [404, 200, 200]
        live.durable.expire(time.time() + 5000)
        assert live.http.get("/v1/requests/b").status_code == 200
        live.durable.expire(time.time() + 20000)
        assert live.http.get("/v1/requests/b").status_code == 404
    with serving(tiny(enable_prefix_caching=False), snapshot_dir=str(tmp_path)) as live:
        assert live.durable._entries == {}, "what was forgotten stays so"


def test_a_server_that_stops_lets_the_next_one_finish(tiny, tmp_path, want):
    """One reader is told, one has left; one request had finished before. The prefix cache goes along."""
    settings = {
        "snapshot_dir": str(tmp_path),
        "enable_admin_endpoints": True,
        "shutdown_timeout": 0,
        "snapshot_pool": True,
    }
    with serving(tiny(), drains=False, **settings) as live:
        post(live, {**BODY, "max_tokens": 5}, headers={"X-Request-Id": "finished"})
        pause_at(live, 12)
        first, ids, last, _ = post(live, BODY, stop_at=9)
    with serving(tiny(), **settings) as live:
        rest, more, _, _ = read(live, headers={"Last-Event-ID": last})
        assert (first[0] + rest[0], ids[0] + more[0]) == want
        texts, tokens, _, _ = read(live, path="/v1/requests/finished")
        assert tokens[0] == want[1][:5]
        assert want[0].startswith(texts[0])
        assert live.llm.engine.blocks.stats.hits >= 8, "what was computed before is found"


def test_another_model_is_refused(tiny, tmp_path, monkeypatch):
    with serving(tiny(enable_prefix_caching=False), snapshot_dir=str(tmp_path)):
        pass
    engine = tiny(enable_prefix_caching=False)
    monkeypatch.setattr(engine, "_fingerprint", (engine.weights_version, "another"))
    llm = AsyncLLM(engine=engine)
    with pytest.raises(SnapshotError, match="another model"):
        asyncio.run(Durable(llm, ServerConfig(snapshot_dir=str(tmp_path))).start())
    llm.close()


def test_what_an_engine_failed_under_goes_on(tiny, tmp_path, want):
    settings = {"snapshot_dir": str(tmp_path), "enable_admin_endpoints": True}
    engine = tiny(enable_prefix_caching=False)
    with serving(engine, **settings) as live, pytest.MonkeyPatch.context() as patch:
        pause_at(live, 9)
        first, _, last, _ = post(live, BODY, stop_at=4)

        def broken(plan):
            raise RuntimeError("the device is gone")

        patch.setattr(engine.runner, "forward", broken)
        with pytest.raises(httpx.TransportError):  # noqa: PT012  # the server ends at once
            live.post("/resume")
            while True:
                live.http.get("/version")
    with serving(tiny(enable_prefix_caching=False), **settings) as live:
        rest, _, _, _ = read(live, headers={"Last-Event-ID": last})
        assert first[0] + rest[0] == want[0]


def test_what_engines_fail_under_again_and_again_is_given_up(tiny, tmp_path):
    settings = {"snapshot_dir": str(tmp_path), "enable_admin_endpoints": True, "shutdown_timeout": 0}
    with serving(tiny(enable_prefix_caching=False), drains=False, **settings) as live:
        live.post("/pause")
        with live.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}, headers=NAME):
            pass
    for _ in range(MAX_DEATHS + 1):
        [*_, journal] = sorted(tmp_path.glob("journal-*"))
        with journal.open("ab") as file:
            file.write(b'{"died": true}\n')
    with serving(tiny(enable_prefix_caching=False), **settings) as live:
        answer = live.http.get("/v1/requests/mine", params={"stream": False})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "aborted")


def test_a_chat_with_tool_calls_goes_on(tiny, tmp_path):
    """Cut after some of its events, that with the call among them; with OpenAI's client, too."""
    engine = tiny(enable_prefix_caching=False)
    before = engine.tokenizer.chat_template
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    asked = {"tools": [FORCED], "tool_choice": "required", "parallel_tool_calls": False}
    body = {"messages": [{"role": "user", "content": "x"}], **asked, "seed": 1, "max_tokens": 150, "stream": True}
    body |= {"logprobs": True, "return_token_ids": True, "temperature": 0.5}
    with serving(engine, chat_template=str(tmp_path / "t.jinja"), snapshot_dir=str(tmp_path / "state")) as live:

        def choices(method, path, stop_after=None, **request):
            with live.http.stream(method, path, **request) as answer:
                for count, (event_id, data) in enumerate(events_of(answer.iter_lines()), 1):
                    yield event_id, data["choices"][0]
                    if count == stop_after or (stop_after == "call" and "tool_calls" in data["choices"][0]["delta"]):
                        return

        def merged(parts):
            deltas = [choice["delta"] for _, choice in parts]
            content = "".join(delta.get("content") or "" for delta in deltas)
            tokens = [token for _, choice in parts for token in choice.get("token_ids", [])]
            positions = [at for _, choice in parts for at in (choice["logprobs"] or {"content": []})["content"]]
            return content, tokens, positions, [call for delta in deltas for call in delta.get("tool_calls", [])]

        whole = list(choices("POST", "/v1/chat/completions", json=body, headers={"X-Request-Id": "whole"}))
        content, tokens, positions, calls = merged(whole)
        assert len(tokens) == len(positions) > 5
        assert [call["function"]["name"] for call in calls] == ["weather"]
        for cut in (cuts := [1, 2, 7, "call", None]):
            name = {"X-Request-Id": f"cut-{cut}"}
            first = list(choices("POST", "/v1/chat/completions", cut, json=body, headers=name))
            last = {"Last-Event-ID": first[-1][0]} if first[-1][0] else {}
            rest = list(choices("GET", f"/v1/requests/cut-{cut}", headers=last))
            got = merged([*first, *rest])
            assert got[:3] == (content, tokens, positions)
            assert [call["function"] for call in got[3]] == [call["function"] for call in calls]
            assert rest[-1][1]["finish_reason"] == "tool_calls"
        stream = live.openai.chat.completions.create(
            model="tiny", messages=body["messages"], **asked, stream=True, extra_headers={"X-Request-Id": "client"}
        )
        assert [chunk.id for chunk in stream][-1] == "chatcmpl-client"
        for request in ("client", "whole", *(f"cut-{cut}" for cut in cuts)):
            assert live.http.delete(f"/v1/requests/{request}").status_code == 200
    engine.tokenizer.chat_template = before
