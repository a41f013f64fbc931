"""/v1/embeddings and /v1/score against a live server: what they give is what `LLM.embed` and `LLM.score` give."""

import numpy as np
import pytest

from tests.engine.support import llm_of

TEXTS = ["Once upon a time", "Hello", "a longer text, of more tokens than a tile of the prefill lane has: " * 3]
IDS = [[3, 4, 5], [9]]


@pytest.fixture
def offline(tiny):
    return llm_of(tiny(enable_prefix_caching=False))  # the server writes to the same pool: see `live`


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_client_gets_embeddings(live, offline, encoding):
    """By default it asks for base64, and decodes it."""
    wanted = offline.embed(TEXTS)
    got = live.openai.embeddings.create(model="tiny", input=TEXTS, **encoding)
    rows = [one.embedding for one in got.data]
    if encoding == {"encoding_format": "base64"}:  # then it leaves them as they come
        import base64

        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert [one.index for one in got.data] == [0, 1, 2]
    assert (got.object, got.model) == ("list", "tiny")
    count = sum(len(offline.get_tokenizer()(text)["input_ids"]) for text in TEXTS)
    assert got.usage.prompt_tokens == got.usage.total_tokens == count


def test_inputs_of_every_kind_and_poolings(live, offline):
    for given, prompts in (("Hello", ["Hello"]), (IDS[0], IDS[:1]), (IDS, IDS)):
        prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        got = live.post("/v1/embeddings", input=given, pooling="mean", normalize=False).json()
        wanted = offline.embed(prompts, pooling="mean", normalize=False)
        np.testing.assert_allclose([one["embedding"] for one in got["data"]], wanted, atol=1e-5)
    cut = live.post("/v1/embeddings", input=[3, 4, 5, 6], truncate_prompt_tokens=2).json()
    np.testing.assert_allclose(cut["data"][0]["embedding"], offline.embed({"prompt_token_ids": [5, 6]})[0], atol=1e-5)
    assert cut["usage"]["prompt_tokens"] == 2


def test_dimensions_are_those_of_the_model(live):
    size = live.llm.engine.model_config.hidden_size
    assert len(live.openai.embeddings.create(model="tiny", input="a", dimensions=size).data[0].embedding) == size
    refused = live.post("/v1/embeddings", input="a", dimensions=size // 2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
    assert f"{size} dimensions" in refused.json()["error"]["message"]


def test_scores(live, offline):
    completions = [" there lived", " a king who had a daughter"]
    for prompts in (TEXTS[0], [TEXTS[0]], TEXTS[:2]):
        got = live.post("/v1/score", prompts=prompts, completions=completions).json()
        wanted = offline.score(prompts, completions)
        assert [one["token_logprobs"] for one in got["data"]] == [pytest.approx(each, abs=1e-5) for each in wanted]
        assert [one["score"] for one in got["data"]] == [pytest.approx(sum(each), abs=1e-4) for each in wanted]
    assert got["usage"]["completion_tokens"] == 0
    [[wanted]] = offline.score({"prompt_token_ids": [3, 4]}, [[5]])
    got = live.post("/v1/score", prompts=[3, 4], completions=[5]).json()
    assert got["data"][0]["score"] == pytest.approx(wanted, abs=1e-5)
