"""Prompts in, text out: prompt forms, incremental detokenisation, stop strings."""

import random

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jpaged.errors import InvalidRequestError
from jpaged.tokenization import Detokenizer, encode_prompt, find_stop, held_back, render_chat

# --------------------------------------------------------------------------------------------------------- prompts


def test_every_form_of_a_prompt(smollm2_tokenizer):
    ids = smollm2_tokenizer.backend_tokenizer.encode("Hello 123").ids
    assert encode_prompt("Hello 123", smollm2_tokenizer) == ("Hello 123", ids, "")
    assert encode_prompt({"prompt": "Hello 123"}, smollm2_tokenizer) == ("Hello 123", ids, "")
    assert encode_prompt({"prompt": "Hello 123", "cache_salt": "é"}, smollm2_tokenizer) == ("Hello 123", ids, "é")
    assert encode_prompt({"prompt_token_ids": ids}, None) == (None, ids, "")
    assert encode_prompt({"prompt_token_ids": ids, "prompt": "shown"}, None) == ("shown", ids, "")
    text, tokens, salt = encode_prompt([{"role": "user", "content": "Hi"}], smollm2_tokenizer)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokens == smollm2_tokenizer.backend_tokenizer.encode(text).ids
    assert salt == ""


@pytest.mark.parametrize(
    "tokens", [np.array([1, 2]), np.array([1, 2], np.int32), (1, 2), range(1, 3), [np.int64(1), 2]]
)
def test_token_ids_may_be_numpys(tokens):
    found = encode_prompt({"prompt_token_ids": tokens}, None)[1]
    assert found == [1, 2]
    assert {type(t) for t in found} == {int}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "a prompt is a string"),
        (None, "a prompt is a string"),
        ([], "a prompt is a string"),
        ([1, 2, 3], "a prompt is a string"),
        ({}, "a prompt is a string"),
        ({"prompt": 5}, "a prompt is a string"),
        ({"prompt": 5, "prompt_token_ids": [1]}, "a prompt is a string"),
        ({"prompt_token_ids": 5}, "prompt_token_ids must be a list"),
        ({"prompt_token_ids": None}, "prompt_token_ids must be a list"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids must be a list"),
        ({"prompt_token_ids": [1], "cache_salt": 5}, "cache_salt"),
        ({"prompt_token_ids": [1], "cache_salt": "x" * 1025}, "cache_salt"),
        ({"prompt_token_ids": [1], "cache_salt": "\ud800"}, "cache_salt"),
        ("lone \ud800 surrogate", "not valid Unicode"),
        ([{"role": "user", "content": "lone \udfff surrogate"}], "not valid Unicode"),
        ([{"role": "user"}], "'content'"),
        ([{"role": 1, "content": "x"}], "'role'"),
        ([{"role": "user", "content": ["x"]}], "'content'"),
    ],
)
def test_what_is_no_prompt_is_refused(smollm2_tokenizer, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        encode_prompt(prompt, smollm2_tokenizer)


@pytest.mark.parametrize("prompt", ["text", {"prompt": "text"}, [{"role": "user", "content": "text"}]])
def test_text_needs_a_tokenizer(prompt):
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        encode_prompt(prompt, None)


def test_a_chat_needs_a_template(smollm2_tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(InvalidRequestError, match="no chat template"):
        render_chat([{"role": "user", "content": "Hi"}], Bare())
    assert not render_chat(
        [{"role": "user", "content": "Hi"}], smollm2_tokenizer, add_generation_prompt=False
    ).endswith("assistant\n")


# --------------------------------------------------------------------------------------------------- detokenisation


def streamed(tokenizer, prompt, tokens, *, skip=True, pieces=1):
    """The text of tokens pushed a few at a time; what was given out on the way never changes."""
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    given_out = ""
    for start in range(0, len(tokens), pieces):
        given_out += detokenizer.push(tokens[start : start + pieces])
        assert detokenizer.text == given_out
    detokenizer.finish()
    assert detokenizer.text.startswith(given_out)
    return detokenizer.text


def whole(tokenizer, prompt, tokens, *, skip=True):
    """The text that the tokens add to the prompt's, decoded at once."""
    backend = tokenizer.backend_tokenizer
    before = backend.decode(prompt, skip_special_tokens=skip)
    text = backend.decode(prompt + tokens, skip_special_tokens=skip)
    assert text.startswith(before)
    return text[len(before) :]


PROMPTS = ["Hello", "a b ", "日本 🦙", "x<|im_end|>\n"]


@settings(max_examples=200)
@given(data=st.data(), prompt=st.sampled_from(PROMPTS), skip=st.booleans(), pieces=st.integers(1, 4))
def test_the_stream_is_the_whole_for_any_tokens(smollm2_tokenizer, data, prompt, skip, pieces):
    """Tokens of all kinds: bytes that are no UTF-8 (most single ones), special tokens, words."""
    prompt = smollm2_tokenizer.backend_tokenizer.encode(prompt).ids
    token = st.integers(0, 49_151) | st.integers(0, 16) | st.integers(17, 300)
    tokens = data.draw(st.lists(token, max_size=40))
    assert streamed(smollm2_tokenizer, prompt, tokens, skip=skip, pieces=pieces) == whole(
        smollm2_tokenizer, prompt, tokens, skip=skip
    )


@settings(max_examples=200)
@given(text=st.text(max_size=40), pieces=st.integers(1, 4))
@example(text="🦙👨‍👩‍👧 é 日本語", pieces=1)
def test_any_text_comes_back(smollm2_tokenizer, text, pieces):
    prompt = smollm2_tokenizer.backend_tokenizer.encode("Say: ").ids
    tokens = smollm2_tokenizer.backend_tokenizer.encode(text).ids
    assert streamed(smollm2_tokenizer, prompt, tokens, pieces=pieces) == whole(smollm2_tokenizer, prompt, tokens)


def test_half_a_character_is_not_given_out(smollm2_tokenizer):
    tokens = smollm2_tokenizer.backend_tokenizer.encode("🦙").ids
    assert len(tokens) == 3
    detokenizer = Detokenizer(smollm2_tokenizer, [1], True)
    assert [detokenizer.push([t]) for t in tokens] == ["", "", "🦙"]


@pytest.mark.parametrize("count", [1, 3, 17, 40])
def test_bytes_that_never_become_a_character_come_at_the_end(smollm2_tokenizer, count):
    middle = smollm2_tokenizer.backend_tokenizer.encode("🦙").ids[1]
    prompt = smollm2_tokenizer.backend_tokenizer.encode("Hi").ids
    assert streamed(smollm2_tokenizer, prompt, [middle] * count) == "�" * count


def test_a_prompt_that_ends_inside_a_character_does_not_leak_into_the_output(smollm2_tokenizer):
    first, second, third = smollm2_tokenizer.backend_tokenizer.encode("🦙").ids
    word = smollm2_tokenizer.backend_tokenizer.encode("word").ids
    assert streamed(smollm2_tokenizer, [*word, first], word) == "word"
    assert streamed(smollm2_tokenizer, [*word, first, second], [third, *word]) == "�word"
    assert streamed(smollm2_tokenizer, [third], word) == "word"


@pytest.fixture(scope="module")
def byte_fallback():
    """As SentencePiece models have it: spaces as ▁, and bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = (
        {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)} | {"▁": 257, "a": 258, "b": 259, "▁a": 260}
    )
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )

    class Wrapped:
        backend_tokenizer = backend

    return Wrapped


@pytest.mark.parametrize("seed", range(3))
def test_byte_fallback_streams_what_is_utf8(byte_fallback, seed):
    rng = random.Random(seed)
    for _ in range(200):
        prompt, tokens = (
            byte_fallback.backend_tokenizer.encode("".join(rng.choices("aé🦙b ", k=rng.randint(1, 9)))).ids
            for _ in range(2)
        )
        assert streamed(byte_fallback, prompt, tokens) == whole(byte_fallback, prompt, tokens)


def test_byte_fallback_survives_what_is_no_utf8(byte_fallback):
    """`DecodeStream` raises when a byte after a finished character takes that character back."""
    e_acute, space_a = [1 + 0xC3, 1 + 0xA9], 260
    assert streamed(byte_fallback, [258], [*e_acute, 1 + 0xC3, 258]) == "é�a"
    assert streamed(byte_fallback, [258], [*e_acute, 1 + 0xC3, space_a, space_a]) == "é� a a"
    assert streamed(byte_fallback, e_acute, [1 + 0xA9, 258, 258]) == "�aa"
    rng = random.Random(0)
    for _ in range(2000):
        tokens = rng.choices([1 + 0xC3, 1 + 0xA9, 257, 258, 259, 260], k=rng.randint(1, 12))
        text = streamed(byte_fallback, [258], tokens)
        letters = [t for t in tokens if t >= 257]
        assert text.replace("�", "").replace("é", "") == byte_fallback.backend_tokenizer.decode([258, *letters])[1:]


# ---------------------------------------------------------------------------------------------------- stop strings


def first_stop(text, stops):
    """By looking at ever longer beginnings of the text: what ends first, and of those the longest."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


letters = st.text("ab", max_size=14)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=500)
@given(pieces=st.lists(letters, max_size=8), stops=stop_strings)
@example(pieces=["ab", "c"], stops=("abc", "b"))
@example(pieces=["abc"], stops=("abc", "b"))
def test_streaming_finds_the_stop_that_a_search_of_the_whole_finds(pieces, stops):
    text, found, shown = "", None, ""
    for piece in pieces:
        text += piece
        found = find_stop(text, len(piece), stops) if piece else None
        if found:
            break
        now = text[: len(text) - held_back(text, stops)]
        assert now.startswith(shown), "what has been shown stays"
        shown = now
    assert found == first_stop("".join(pieces), stops)
    if found:
        assert text[: found[0]].startswith(shown), "nothing of the stop string has been shown"


@settings(max_examples=300)
@given(text=letters, stops=stop_strings)
def test_exactly_what_could_become_a_stop_string_is_held_back(text, stops):
    assume(first_stop(text, stops) is None)
    held = held_back(text, stops)
    assert held == 0 or any(s.startswith(text[len(text) - held :]) and len(s) > held for s in stops)
    for more in range(held + 1, len(text) + 1):
        assert not any(s.startswith(text[-more:]) and len(s) > more for s in stops)


def test_no_stops_hold_nothing_back():
    assert held_back("text", ()) == 0
    assert find_stop("text", 4, ()) is None
