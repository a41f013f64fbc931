"""What is wrong with a request is said, with the right status, and disturbs nobody."""

import pytest

from tests.server.support import raw_connection

C, CHAT, T, D = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
E, S = "/v1/embeddings", "/v1/score"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}

# (path, body, status, what the message says)
BAD = [
    (C, {}, 400, "prompt"),
    (C, {"prompt": None}, 400, "prompt"),
    (C, {"prompt": 7}, 400, "prompt"),
    (C, {"prompt": ""}, 400, "empty"),
    (C, {"prompt": []}, 400, "empty"),
    (C, {"prompt": [[]]}, 400, "empty"),
    (C, {"prompt": ["a", ""]}, 400, "empty"),
    (C, {"prompt": ["a", 1]}, 400, "prompt"),
    (C, {"prompt": [1.5]}, 400, "prompt"),
    (C, {"prompt": [384]}, 400, "outside the vocabulary"),
    (C, {"prompt": [-1]}, 400, "outside the vocabulary"),
    (C, {"prompt": ["a"] * 300}, 400, "too many"),
    (C, {"prompt": [3] * 300}, 400, "maximum context length"),
    (C, {"prompt": [3] * 200, "max_tokens": 100}, 400, "maximum context length"),
    (C, {"prompt": "a", "model": "gpt-4"}, 404, "does not exist"),
    (C, {"prompt": "a", "model": 3}, 400, "model"),
    (C, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (C, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    (C, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    (C, {"prompt": "a", "max_tokens": 1 << 40}, 400, "max_tokens"),
    (C, {"prompt": "a", "temperature": -0.1}, 400, "temperature"),
    (C, {"prompt": "a", "temperature": 2.1}, 400, "temperature"),
    (C, {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    (C, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    (C, {"prompt": "a", "top_p": 1.5}, 400, "top_p"),
    (C, {"prompt": "a", "top_k": -2}, 400, "top_k"),
    (C, {"prompt": "a", "min_p": 2}, 400, "min_p"),
    (C, {"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty"),
    (C, {"prompt": "a", "frequency_penalty": -3}, 400, "frequency_penalty"),
    (C, {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty"),
    (C, {"prompt": "a", "n": 0}, 400, "n must be"),
    (C, {"prompt": "a", "n": 65}, 400, "n must be"),
    (C, {"prompt": "a", "n": 9, "temperature": 1}, 400, "max_num_seqs"),
    (C, {"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of"),
    (C, {"prompt": "a", "best_of": 1000}, 400, "best_of"),
    (C, {"prompt": "a", "best_of": 2, "stream": True, "temperature": 1}, 400, "best_of"),
    (C, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (C, {"prompt": "a", "logprobs": -1}, 400, "logprobs"),
    (C, {"prompt": "a", "logprobs": True}, 400, "logprobs"),
    (C, {"prompt": "a", "prompt_logprobs": 100}, 400, "prompt_logprobs"),
    (C, {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, 400, "echo"),
    (C, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    (C, {"prompt": "a", "stop": ["x"] * 65}, 400, "stop"),
    (C, {"prompt": "a", "stop": [""]}, 400, "stop"),
    (C, {"prompt": "a", "stop": [3]}, 400, "stop"),
    (C, {"prompt": "a", "stop_token_ids": [999]}, 400, "stop_token_ids"),
    (C, {"prompt": "a", "bad_words": ["x" * 2000]}, 400, "bad_words"),
    (C, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (C, {"prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias"),
    (C, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias"),
    (C, {"prompt": "a", "allowed_token_ids": []}, 400, "allowed_token_ids"),
    (C, {"prompt": "a", "seed": 1 << 70}, 400, "seed"),
    (C, {"prompt": "a", "min_tokens": 20, "max_tokens": 10}, 400, "min_tokens"),
    (C, {"prompt": "a", "use_beam_search": True, "temperature": 1}, 400, "temperature"),
    (C, {"prompt": "a", "length_penalty": 2.0}, 400, "use_beam_search"),
    (C, {"prompt": "a", "priority": 5}, 400, "priority"),
    (C, {"prompt": "a", "cache_salt": "s" * 2000}, 400, "cache_salt"),
    (C, {"prompt": "a", "request_id": ""}, 400, "request_id"),
    (C, {"prompt": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    (C, {"prompt": "a", "structured_outputs": {"regex": "("}}, 400, "regex"),
    (C, {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "exactly one"),
    (C, {"prompt": "a", "structured_outputs": {}}, 400, "exactly one"),
    (C, {"prompt": "a", "response_format": {"type": "yaml"}}, 400, "response_format"),
    (C, {"prompt": "a", "stream_options": {"include": 1}}, 400, "stream_options"),
    (C, {"prompt": "a", "no_such_field": 1}, 400, "no_such_field"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "Hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "Hi"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, "top_logprobs"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": "x"}}, 400, "messages"),
    (CHAT, {"messages": HI, "continue_final_message": True, "add_generation_prompt": True}, 400, "exclude"),
    (CHAT, {"messages": HI, "tools": [TOOL]}, 400, "--enable-auto-tool-choice"),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "sometimes"}, 400, "tool_choice"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "tools"),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools"),
    (CHAT, {"messages": HI, "functions": []}, 400, "functions"),
    (CHAT, {"messages": HI, "modalities": ["audio"]}, 400, "modalities"),
    (CHAT, {"messages": HI, "store": True}, 400, "store"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, 400, "json_schema"),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "'g'"),
    (T, {}, 400, "prompt or messages"),
    (T, {"prompt": "a", "messages": HI}, 400, "prompt or messages"),
    (D, {"tokens": [-5]}, 400, "vocabulary"),
    (D, {"tokens": "x"}, 400, "tokens"),
    (E, {}, 400, "input"),
    (E, {"input": []}, 400, "empty"),
    (E, {"input": ""}, 400, "empty"),
    (E, {"input": [384]}, 400, "outside the vocabulary"),
    (E, {"input": [3] * 256}, 400, "maximum context length"),
    (E, {"input": "a", "dimensions": 7}, 400, "dimensions"),
    (E, {"input": "a", "dimensions": "7"}, 400, "dimensions"),
    (E, {"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    (E, {"input": "a", "pooling": "max"}, 400, "pooling"),
    (E, {"input": "a", "max_tokens": 3}, 400, "max_tokens"),
    (E, {"input": ["a"] * 300}, 400, "too many"),
    (E, {"input": "a", "model": "gpt-4"}, 404, "does not exist"),
    (S, {"prompts": "a"}, 400, "completions"),
    (S, {"prompts": "a", "completions": []}, 400, "completions"),
    (S, {"prompts": "a", "completions": [""]}, 400, "a completion is empty"),
    (S, {"prompts": "", "completions": ["a"]}, 400, "empty"),
    (S, {"prompts": ["a", "b"], "completions": ["a"]}, 400, "as many completions"),
    (S, {"prompts": "a", "completions": ["a"] * 300}, 400, "completions"),
    (S, {"prompts": [3] * 200, "completions": [3] * 100}, 400, "maximum context length"),
    (S, {"prompts": "a", "completions": [[-1]]}, 400, "outside the vocabulary"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/health", {}, 405, "Not Allowed"),
    ("/pause", {}, 404, "Not Found"),
]  # fmt: skip

# (body as bytes, status, what the message says)
BROKEN = [
    (b"", 400, ""),
    (b"{", 400, "JSON"),
    (b"\xff\xfe", 400, "JSON"),
    (b"[]", 400, ""),
    (b'"prompt"', 400, ""),
    (b"null", 400, ""),
    (b'{"prompt": "a", "temperature": NaN}', 400, "JSON"),
    (b'{"prompt": "a", "temperature": Infinity}', 400, "JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    (b'{"prompt": "a", "seed": ' + b"9" * 10000 + b"}", 400, ""),
    (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "JSON"),
    (b'{"prompt": "a", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", 400, "JSON"),
    (b'{"prompt": "\\ud800"}', 400, ""),
    (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', 413, "larger"),
]


def check(answer, status, says):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD, ids=[f"{b[0]} {str(b[1])[:50]}" for b in BAD])
def test_bad_requests(live, good, path, body, status, says):
    check(live.http.post(path, json=body), status, says)


@pytest.mark.parametrize(("body", "status", "says"), BROKEN, ids=[str(b[0][:40]) for b in BROKEN])
def test_broken_bodies(live, good, body, status, says):
    check(live.http.post(C, content=body, headers={"content-type": "application/json"}), status, says)


def test_bodies_that_are_not_json(live):
    check(
        live.http.post(C, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}), 415, "application/json"
    )


def test_a_body_that_grows_beyond_the_limit_is_cut_off(live):
    def chunks():
        for _ in range(80):
            yield b" " * (64 << 10)

    check(live.http.post(C, content=chunks(), headers={"content-type": "application/json"}), 413, "larger")


def test_large_headers_are_refused(live):
    answer = live.http.get("/v1/models", headers={f"x-{i}": "a" * 1000 for i in range(80)})
    check(answer, 431, "headers")


def test_what_is_not_http_is_answered(live):
    with raw_connection(live) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
