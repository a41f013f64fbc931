"""A KV cache of 8-bit numbers: close to the whole cache, and as indifferent to what else runs."""

import json

import jax
import numpy as np
import pytest

from jpaged import LLM, SamplingParams
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError
from tests.engine.support import GOLDENS, engine_factory, run

CHATS = json.loads((GOLDENS / "smollm2_chats.json").read_text())
SMALL = {
    "max_num_seqs": 8,
    "max_model_len": 128,
    "block_size": 4,
    "num_gpu_blocks_override": 200,
    "max_num_batched_tokens": 8 + 32,
    "warmup": False,
}


@pytest.fixture(scope="module", params=["int8", "fp8"])
def quantized(request):
    """Engines over the tiny Llama."""
    model = str(GOLDENS / "models" / "llama")
    return engine_factory(EngineConfig(model=model, kv_cache_dtype=request.param, **SMALL))


def scores_of(engine, prompts):
    """Log-probability of each token of each prompt but its first."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    finished = run(engine)
    outputs = [finished[str(i)] for i in range(len(prompts))]
    return [
        np.array([at[token].logprob for at, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)])
        for o in outputs
    ]


def test_whatever_else_runs_the_tokens_are_the_same(quantized):
    """Copies on write, swaps, recompute, chunks and cached prefixes: a token's bits follow from its prefix alone."""
    prompts = [[5 + (7 * i + 3 * j) % 370 for j in range(length)] for i, length in enumerate((21, 40, 3, 33))]
    params = [
        SamplingParams(n=3, temperature=0.9, seed=i, max_tokens=20, ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    params[1] = SamplingParams(n=3, use_beam_search=True, temperature=0, max_tokens=12, detokenize=False)

    def tokens(engine, which):
        for i in which:
            engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, params[i])
        finished = run(engine)
        return {i: [completion.token_ids for completion in finished[str(i)].outputs] for i in which}

    everyone = range(len(prompts))
    alone = [tokens(quantized(enable_prefix_caching=False), [i])[i] for i in everyone]
    crowded = quantized(num_blocks=36, swap_blocks=100, max_num_batched_tokens=8 + 16)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(crowded.runner.pool)]
    for _ in range(2):  # the second time from the prefix cache
        together = tokens(crowded, everyone)
        assert [together[i] for i in everyone] == alone
    assert crowded.scheduler.num_swaps_in > 0
    assert crowded.blocks.num_copies > 0
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(crowded.runner.pool)] == pointers, "in place"


@pytest.mark.parametrize(
    ("model", "kind", "noise"), [("gemma2", "int8", 0.04), ("gpt_oss", "fp8", 0.15), ("opt", "int8", 0.04)]
)
def test_other_attentions(model, kind, noise):
    """Soft caps, windows and sinks, heads that share nothing: against Hugging Face's scores over a whole cache.

    Weights are random, so scores spread widely; noise is a share of that spread.
    """
    reference = np.load(GOLDENS / "models" / model / "reference.npz")
    prompt = reference["p1_input_ids"]
    logits = reference["p1_logits"].astype(np.float64)
    wanted = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(prompt) - 1), prompt[1:]]
    llm = LLM(model=str(GOLDENS / "models" / model), kv_cache_dtype=kind, **SMALL)
    llm.engine.scheduler.buckets = llm.engine.scheduler.buckets[-1:]  # one shape to compile
    [scores] = scores_of(llm.engine, [prompt.tolist()])
    assert 1e-3 < np.sqrt(((scores - wanted) ** 2).mean()) / wanted.std() < noise


def test_the_real_model_is_as_sure_of_its_answers():
    """SmolLM2's own greedy answers to short chats, scored: what is said in docs/kernels.md."""
    make = engine_factory(
        EngineConfig(
            model="smollm2-135m",
            kv_cache_dtype="int8",
            max_num_seqs=4,
            max_model_len=256,
            num_gpu_blocks_override=300,
            max_num_batched_tokens=4 + 256,
            warmup=False,
        )
    )
    engine = make()
    engine.scheduler.buckets = engine.scheduler.buckets[-1:]
    chats = [chat for chat in CHATS if len(chat["prompt_token_ids"]) < 100]
    scores = scores_of(engine, [chat["prompt_token_ids"] + chat["output_token_ids"] for chat in chats])
    errors = np.concatenate([s[-len(c["logprobs"]) :] - c["logprobs"] for s, c in zip(scores, chats, strict=True)])
    assert np.abs(errors).mean() < 0.03
    assert np.abs(errors).max() < 0.4


def test_latent_attention_is_refused():
    with pytest.raises(InvalidConfigError, match="latent"):
        LLM(model=str(GOLDENS / "models" / "deepseek_v3"), kv_cache_dtype="fp8", **SMALL)


def test_other_names_are_refused():
    with pytest.raises(InvalidConfigError, match="must be one of auto, int8, fp8"):
        EngineConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
