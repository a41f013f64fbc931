"""Greedy tokens and log-probabilities equal Hugging Face's, however the work is cut and whatever goes wrong."""

import json

import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.config import EngineConfig
from tests.engine.support import GOLDENS, engine_factory, run

CHATS = json.loads((GOLDENS / "smollm2_chats.json").read_text())
TINY = np.load(GOLDENS / "models" / "llama" / "reference.npz")


def add_chats(engine, chats):
    greedy = SamplingParams(temperature=0, max_tokens=48, logprobs=5)
    for i, chat in chats.items():
        engine.add_request(str(i), {"prompt_token_ids": chat["prompt_token_ids"]}, greedy)


def check_chat(output, chat):
    completion = output.outputs[0]
    assert completion.token_ids == chat["output_token_ids"]
    assert completion.text == chat["output_text"]
    for token, at, expected, ids, values in zip(
        completion.token_ids,
        completion.logprobs,
        chat["logprobs"],
        chat["top5_ids"],
        chat["top5_logprobs"],
        strict=True,
    ):
        assert at[token].logprob == pytest.approx(expected, abs=1e-3)
        assert {t: at[t].logprob for t in ids} == pytest.approx(dict(zip(ids, values, strict=True)), abs=1e-3)


def test_chat_template_gives_the_reference_prompt(smollm2):
    engine = smollm2()
    for i, chat in enumerate(CHATS):
        engine.add_request(str(i), chat["messages"], SamplingParams(max_tokens=1))
        group = engine._groups[str(i)]
        assert group.prompt == chat["prompt_text"]
        assert group.prompt_token_ids == chat["prompt_token_ids"]
    engine.abort([str(i) for i in range(len(CHATS))])


def test_twenty_chats_together(smollm2):
    """In steps that are compiled in pieces, as the tiny models, which have few layers, are not."""
    engine = smollm2()
    pool = [layer.unsafe_buffer_pointer() for layer in engine.runner.pool]
    add_chats(engine, dict(enumerate(CHATS)))
    finished = run(engine)
    assert [layer.unsafe_buffer_pointer() for layer in engine.runner.pool] == pool
    for i, chat in enumerate(CHATS):
        check_chat(finished[str(i)], chat)


def test_preempted_aborted_and_in_chunks_of_64(smollm2):
    """A pool that holds little more than the longest chat, chunks of 64 tokens, and every other chat is aborted."""
    engine = smollm2(num_blocks=32, max_num_batched_tokens=64 + 8, enable_prefix_caching=False)
    chats = {i: chat for i, chat in enumerate(CHATS) if len(chat["prompt_token_ids"]) <= 300}
    add_chats(engine, chats)
    victims = [str(i) for i in chats if i % 2 == 0]

    def abort_some(step):
        if step % 8 == 7 and victims:
            engine.abort(victims.pop(0))

    finished = run(engine, after_step=abort_some)
    assert engine.scheduler.num_preemptions > 0
    for i, chat in chats.items():
        output = finished[str(i)].outputs[0]
        if output.finish_reason == "abort":
            assert output.token_ids == chat["output_token_ids"][: len(output.token_ids)]
        else:
            check_chat(finished[str(i)], chat)
    assert sum(o.outputs[0].finish_reason == "abort" for o in finished.values()) >= 5


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3"])
def test_families_that_ask_something_of_the_engine(name):
    """Layers with windows and a RoPE of their own; experts and a pool of latents. `tests/models` has all families."""
    folder = GOLDENS / "models" / name
    engine = engine_factory(
        EngineConfig(
            model=str(folder),
            max_num_seqs=2,
            max_model_len=80,
            max_num_batched_tokens=2 + 16,
            num_gpu_blocks_override=90,
            block_size=4,
            warmup=False,
        )
    )()
    reference, greedy = np.load(folder / "reference.npz"), SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for prompt in ("p0", "p1"):
        engine.add_request(prompt, {"prompt_token_ids": reference[f"{prompt}_input_ids"].tolist()}, greedy)
    for prompt, output in run(engine).items():
        assert output.outputs[0].token_ids == reference[f"{prompt}_greedy_ids"].tolist()


def test_blocks_behind_a_window_are_others_to_use():
    """Mistral: all layers see 16 tokens. Copies of one request hold no more than their windows, and read nothing else."""
    folder = GOLDENS / "models" / "mistral"
    engine = engine_factory(
        EngineConfig(
            model=str(folder),
            max_num_seqs=8,
            max_model_len=80,
            max_num_batched_tokens=8 + 16,
            num_gpu_blocks_override=56,
            block_size=4,
            warmup=False,
        )
    )(enable_prefix_caching=False)
    assert engine.blocks.windows == (16,)
    reference, greedy = np.load(folder / "reference.npz"), SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    prompt = reference["p0_input_ids"].tolist()
    for i in range(8):
        engine.add_request(f"{i}", {"prompt_token_ids": prompt}, greedy)
    held = []

    def look(step):
        decoding = engine.scheduler.batch.position >= len(prompt)
        held.extend((engine.blocks.counts - engine.blocks.firsts[:, 0])[decoding].tolist())

    for output in run(engine, after_step=look).values():
        assert output.outputs[0].token_ids == reference["p0_greedy_ids"].tolist()
    assert max(held) <= (16 + 4) // 4 + 2 < engine.blocks.blocks_for(len(prompt) + 31)


@pytest.mark.parametrize("prompt", ["p0", "p1"])
def test_tiny_llama_greedy(tiny, prompt):
    engine = tiny()
    ids = TINY[f"{prompt}_input_ids"].tolist()
    engine.add_request(
        "a",
        {"prompt_token_ids": ids},
        SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5, prompt_logprobs=5),
    )
    output = run(engine)["a"]
    completion = output.outputs[0]
    assert completion.token_ids == TINY[f"{prompt}_greedy_ids"].tolist()
    for at, ids5, values in zip(
        completion.logprobs, TINY[f"{prompt}_top5_ids"], TINY[f"{prompt}_top5_logprobs"], strict=True
    ):
        assert [at[int(t)].logprob for t in ids5] == pytest.approx(values.tolist(), abs=1e-3)
        assert [at[int(t)].rank for t in ids5] == [1, 2, 3, 4, 5]
    logits = TINY[f"{prompt}_logits"].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(ids)
    for position in range(1, len(ids)):
        token = ids[position]
        at = output.prompt_logprobs[position]
        assert at[token].logprob == pytest.approx(expected[position - 1, token], abs=1e-3)
        assert at[token].rank == 1 + (expected[position - 1] > expected[position - 1, token]).sum()
        assert len(at) in (5, 6)
