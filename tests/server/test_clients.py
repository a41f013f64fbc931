"""Programs that people have already, against a live server: litellm, LangChain, lm-eval.

They are large, and not needed to develop jpaged: `uv run --group dev --with litellm --with langchain-openai --with 'lm-eval[api]' pytest tests/server/test_clients.py`.
Without them these tests are skipped.
"""

import asyncio
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import SamplingParams
from tests.engine.support import GOLDENS, llm_of

CHAT = [{"role": "user", "content": "Hello"}]
ANSWER = {
    "title": "answer",
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "green"]}},
    "required": ["sky"],
    "additionalProperties": False,
}


@pytest.fixture
def offline(tiny):
    return llm_of(tiny(enable_prefix_caching=False))  # the server writes to the same pool: see `live`


@pytest.fixture
def answer(offline):
    """What the model says to CHAT."""
    return offline.chat(CHAT, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0].text


def test_litellm(live, offline, answer):
    litellm = pytest.importorskip("litellm")
    where = {"model": "openai/tiny", "api_base": f"{live.url}/v1", "api_key": "none"}
    greedy = {"temperature": 0, "max_tokens": 24}
    whole = litellm.completion(messages=CHAT, **where, **greedy)
    assert whole.choices[0].message.content == answer
    chunks = litellm.completion(messages=CHAT, stream=True, **where, **greedy)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    later = asyncio.run(litellm.acompletion(messages=CHAT, **where, **greedy))
    assert later.choices[0].message.content == answer
    text = litellm.text_completion(prompt="Once", **where, **greedy)
    [wanted] = offline.generate("Once", SamplingParams(temperature=0, max_tokens=24))
    assert text.choices[0].text == wanted.outputs[0].text
    found = litellm.embedding(input=["a", "b"], encoding_format="float", **where)
    np.testing.assert_allclose([one["embedding"] for one in found.data], offline.embed(["a", "b"]), atol=1e-5)
    with pytest.raises(litellm.BadRequestError, match="maximum context length"):
        litellm.completion(messages=CHAT, **where, max_tokens=300)
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
    formed = litellm.completion(messages=CHAT, response_format=schema, **where, **greedy)
    assert json.loads(formed.choices[0].message.content)["sky"] in ("blue", "green")


def test_langchain(live, offline, answer):
    openai = pytest.importorskip("langchain_openai")
    where = {"model": "tiny", "base_url": f"{live.url}/v1", "api_key": "none"}
    model = openai.ChatOpenAI(temperature=0, max_tokens=24, **where)
    told = model.invoke([("user", "Hello")])
    assert told.content == answer
    assert told.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream([("user", "Hello")])) == answer
    assert [message.content for message in asyncio.run(model.abatch(["Hello", "Hello"]))] == [answer, answer]
    formed = model.with_structured_output(ANSWER, method="json_schema").invoke("What colour is the sky?")
    assert formed["sky"] in ("blue", "green")
    texts = ["a", "some more of it"]
    found = openai.OpenAIEmbeddings(check_embedding_ctx_length=False, **where).embed_documents(texts)
    np.testing.assert_allclose(found, offline.embed(texts), atol=1e-5)


def test_langchain_calls_tools(with_tools):
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(model="tiny", base_url=f"{with_tools.url}/v1", api_key="none", max_tokens=64)
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": ANSWER}}
    called = model.bind_tools([tool], tool_choice="look").invoke("Look at the sky.")
    assert [call["name"] for call in called.tool_calls] == ["look"]
    assert called.tool_calls[0]["args"]["sky"] in ("blue", "green")


@pytest.fixture
def harness(live):
    """lm-eval's `local-completions`, which scores by echo and logprobs."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    return models.LocalCompletionsAPI(
        model="tiny",
        base_url=f"{live.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(GOLDENS / "models" / "llama"),
        batch_size=4,
        max_length=256,
    )


def test_lm_eval_scores_as_the_offline_engine(harness, offline):
    from lm_eval.api.instance import Instance

    pairs = [("Once upon a time", f" there {word}") for word in ("was", "lived", "is a king who", "!")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    engine = offline.engine
    for pair, (score, greedy) in zip(pairs, harness.loglikelihood(requests, disable_tqdm=True), strict=True):
        start, whole = len(harness.tok_encode(pair[0])), harness.tok_encode("".join(pair))
        prompt = {"prompt_token_ids": whole[:start]}
        [logprobs] = offline.score(prompt, [whole[start:]], use_tqdm=False)
        assert score == pytest.approx(sum(logprobs), abs=1e-4)
        logits = engine.runner.model.apply({"params": engine.params}, jnp.array([whole]), method="forward_logits")
        assert greedy == (np.argmax(logits[0, start - 1 : -1], axis=-1).tolist() == whole[start:])


def test_lm_eval_runs_a_local_task(harness, offline, tmp_path):
    """Four questions with two choices each; the harness' accuracy is what offline scores say."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    questions = [{"question": f"Question {i}:", "choices": [" yes", " no"], "label": i % 2} for i in range(4)]
    (tmp_path / "task.json").write_text(json.dumps(questions))
    task = ConfigurableTask(
        config={
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.json")}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
    right = []
    for question in questions:
        scores = [sum(s) for s in offline.score(question["question"], question["choices"], use_tqdm=False)]
        right.append(np.argmax(scores) == question["label"])
    assert math.isclose(results["results"]["local"]["acc,none"], np.mean(right))
    samples = results["samples"]["local"]
    for sample in samples:
        scores = [sum(s) for s in offline.score(sample["doc"]["question"], sample["doc"]["choices"], use_tqdm=False)]
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
