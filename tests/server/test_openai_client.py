"""The real `openai` client against a live server: what it gets equals what the offline engine gives."""

import asyncio

import openai
import pytest

from jpaged import SamplingParams
from tests.engine.support import llm_of
from tests.server.support import serving

PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def offline(tiny):
    return llm_of(tiny(enable_prefix_caching=False))  # the server writes to the same pool: see `live`


def params(**changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **changes})


def test_completion(live, offline):
    [want] = offline.generate(PROMPT, params())
    got = live.openai.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want.outputs[0].text, "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(want.prompt_token_ids), 24)
    assert (got.model, got.object) == ("tiny", "text_completion")


def test_streamed_completion_adds_up(live, offline):
    [want] = offline.generate(PROMPT, params(n=2, temperature=0.9, seed=7))
    stream = live.openai.completions.create(
        model="tiny", prompt=PROMPT, n=2, seed=7, stream=True, stream_options={"include_usage": True},
        **{**GREEDY, "temperature": 0.9},
    )  # fmt: skip
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [o.text for o in want.outputs]
    assert reasons == ["length", "length"]
    assert usage.completion_tokens == 48


def test_prompts_of_every_kind(live, offline):
    ids = [3, 4, 5]
    for prompt, prompts in (
        (["a", "b", "c"], ["a", "b", "c"]),
        (ids, [{"prompt_token_ids": ids}]),
        ([ids, [9]], [{"prompt_token_ids": ids}, {"prompt_token_ids": [9]}]),
    ):
        want = offline.generate(prompts, params())
        got = live.openai.completions.create(model="tiny", prompt=prompt, **GREEDY)
        assert [c.text for c in got.choices] == [o.outputs[0].text for o in want]
        assert [c.index for c in got.choices] == list(range(len(prompts)))
        chunks = live.openai.completions.create(model="tiny", prompt=prompt, stream=True, **GREEDY)
        texts = [""] * len(prompts)
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [o.outputs[0].text for o in want]


def test_echo_with_logprobs_scores_a_text(live, offline):
    [want] = offline.generate({"prompt_token_ids": [3, 4, 5, 6]}, params(max_tokens=1, prompt_logprobs=2, logprobs=2))
    got = live.openai.completions.create(
        model="tiny", prompt=[3, 4, 5, 6], max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    logprobs = got.choices[0].logprobs
    scores = [None] + [at[t].logprob for t, at in zip([4, 5, 6], want.prompt_logprobs[1:], strict=True)]
    assert logprobs.token_logprobs == scores
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 4
    assert got.usage.completion_tokens == 0
    more = live.openai.completions.create(
        model="tiny", prompt=[3, 4, 5, 6], max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    assert len(more.choices[0].logprobs.tokens) == 5
    assert more.choices[0].text.startswith(got.choices[0].text)


def test_best_of_and_beams(live, offline):
    best = live.openai.completions.create(
        model="tiny", prompt=PROMPT, n=2, best_of=4, seed=3, max_tokens=8, temperature=0.8
    )
    [want] = offline.generate(PROMPT, SamplingParams(n=2, best_of=4, seed=3, max_tokens=8, temperature=0.8))
    assert [c.text for c in best.choices] == [o.text for o in want.outputs]
    beams = live.openai.completions.create(
        model="tiny", prompt=PROMPT, n=3, max_tokens=8, extra_body={"use_beam_search": True, "length_penalty": 0.5}
    )
    [want] = offline.generate(
        PROMPT, SamplingParams(n=3, use_beam_search=True, temperature=0, length_penalty=0.5, max_tokens=8)
    )
    assert [c.text for c in beams.choices] == [o.text for o in want.outputs]
    assert [c.score for c in beams.choices] == [o.score for o in want.outputs]


def test_chat(live, offline):
    [want] = offline.chat(CHAT, params(logprobs=3))
    got = live.openai.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", want.outputs[0].text)
    assert [t.logprob for t in choice.logprobs.content] == [
        at[token].logprob for token, at in zip(want.outputs[0].token_ids, want.outputs[0].logprobs, strict=True)
    ]
    assert all(len(t.top_logprobs) == 3 for t in choice.logprobs.content)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    again = live.openai.chat.completions.create(model="tiny", messages=parts, **GREEDY)
    assert again.choices[0].message.content == want.outputs[0].text


def test_streamed_chat_adds_up(live, offline):
    [want] = offline.chat(CHAT, params(n=2, temperature=1.0, seed=1))
    stream = live.openai.chat.completions.create(
        model="tiny", messages=CHAT, n=2, seed=1, stream=True, stream_options={"include_usage": True}, logprobs=True,
        **{**GREEDY, "temperature": 1.0},
    )  # fmt: skip
    texts, counts, usage = ["", ""], [0, 0], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [o.text for o in want.outputs]
    assert counts == [24, 24]
    assert usage.prompt_tokens == len(want.prompt_token_ids)


def test_continue_final_message(live, offline):
    messages = [*CHAT, {"role": "assistant", "content": "I am"}]
    [want] = offline.chat(messages, params(), continue_final_message=True)
    body = {"ignore_eos": True, "continue_final_message": True}
    got = live.openai.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24, extra_body=body
    )
    assert got.choices[0].message.content == want.outputs[0].text


def test_async_client_with_many_at_once(live, offline):
    prompts = [f"prompt {i}" for i in range(24)]
    want = [o.outputs[0].text for o in offline.generate(prompts, params())]

    async def main():
        async with live.async_openai() as client:

            async def one(prompt):
                stream = await client.completions.create(model="tiny", prompt=prompt, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(main()) == want


def test_extra_fields(live):
    body = {
        "return_token_ids": True,
        "truncate_prompt_tokens": 3,
        "prompt_logprobs": 1,
        "request_id": "mine",
        "top_k": 5,
    }
    got = live.post("/v1/completions", prompt=[3, 4, 5, 6, 7], max_tokens=4, cache_salt="s", user="me", **body).json()
    assert got["id"] == "cmpl-mine"
    choice = got["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert len(choice["token_ids"]) <= 4
    assert len(choice["prompt_logprobs"]) == 3


def test_models(live):
    assert [m.id for m in live.openai.models.list()] == ["tiny", "another"]
    assert live.openai.models.retrieve("another").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        live.openai.models.retrieve("gpt-4")


def test_tokenize_and_back(live, offline):
    got = live.post("/tokenize", prompt="Hello there", return_token_strs=True).json()
    assert got["tokens"] == offline.get_tokenizer()("Hello there")["input_ids"]
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert "Hello there" in live.post("/detokenize", tokens=got["tokens"]).json()["prompt"]
    chat = live.post("/tokenize", messages=CHAT).json()
    [want] = offline.chat(CHAT, params(max_tokens=1))
    assert chat["tokens"] == want.prompt_token_ids


def test_a_second_turn_finds_the_first_in_the_cache(tiny):
    with serving(tiny()) as live:
        first = live.openai.chat.completions.create(model="tiny", messages=CHAT * 4, **GREEDY)
        second = live.openai.chat.completions.create(model="tiny", messages=CHAT * 4, **GREEDY)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > 0
