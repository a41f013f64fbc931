"""Batch-invariant mode: log-probabilities of served tokens are bitwise those of the training forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, SamplingParams
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError
from jpaged.models import batch_invariant
from jpaged.scheduling.ngrams import NgramSpeculator
from tests.engine.support import GOLDENS, engine_factory, run

LENGTHS = [(3, 20), (16, 12), (17, 30), (40, 8), (64, 16), (90, 25), (1, 40), (33, 10)]
REQUESTS = [
    (
        [5 + (7 * i + 3 * j) % 370 if j > 20 else 5 + j for j in range(length)],  # all begin alike
        SamplingParams(temperature=1.0, seed=1000 + i, max_tokens=out, ignore_eos=True, logprobs=2, prompt_logprobs=0),
    )
    for i, (length, out) in enumerate(LENGTHS)
]


@functools.cache
def engines(family, mode=True, tile=16, block_size=4):
    return engine_factory(
        EngineConfig(
            model=str(GOLDENS / "models" / family),
            batch_invariant=mode,
            dtype="float32",
            max_num_seqs=4,
            max_model_len=160,
            prefill_tile_size=tile,
            block_size=block_size,
            num_gpu_blocks_override=800 // block_size,
            max_num_batched_tokens=4 + 4 * tile,
            warmup=False,
        )
    )


@functools.cache
def trained(family, batch):
    """The training program: float32 [batch, T - 1] of int32 [batch, T]."""
    model = engines(family)().runner.model
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="token_logprobs"))


def served(output):
    """(tokens, log-probabilities of all but the first, or of the output) of a finished request."""
    [answer] = output.outputs
    tokens = output.prompt_token_ids + answer.token_ids
    known = [*(output.prompt_logprobs or ())][1:] + list(answer.logprobs)
    scored = tokens[len(tokens) - len(known) :]
    return tokens, np.array([at[token].logprob for at, token in zip(known, scored, strict=True)], np.float32)


def serve(engine, which):
    for i in which:
        prompt, params = REQUESTS[i]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    return {request: served(output) for request, output in run(engine).items()}


def differences(family, results, batch=1):
    """How many log-probabilities differ, in any bit, from training's on `batch` padded sequences at once."""
    params, count = engines(family)().params, 0
    for tokens, logprobs in results.values():
        padded = np.zeros((batch, 160), np.int32)  # what is to the right has no influence
        padded[-1, : len(tokens)] = tokens
        padded[:-1] = np.arange(160)
        count += int((np.asarray(trained(family, batch)(params, padded))[-1, : len(tokens) - 1] != logprobs).sum())
    return count


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_served_bits_are_trained_bits(family):
    groups = engines(family)().blocks.num_groups
    few = {1: 34, 2: 53, 3: 76}[groups]  # of the alternating, as many as are asked for
    engine = engines(family)(num_blocks=few, enable_prefix_caching=False)
    results = serve(engine, range(len(REQUESTS)))
    assert engine.scheduler.num_preemptions > 0 or groups == 3, "some are computed twice"
    assert differences(family, results) == 0
    alone = serve(engines(family)(enable_prefix_caching=False), [5])
    assert alone["5"][0] == results["5"][0]
    np.testing.assert_array_equal(alone["5"][1], results["5"][1])


def test_neither_cuts_nor_blocks_nor_batches_change_a_bit():
    results = serve(engines("llama", tile=5, block_size=32)(), range(len(REQUESTS)))
    assert differences("llama", results, batch=3) == 0


def test_what_the_prefix_cache_found_has_the_same_bits():
    engine = engines("llama")()
    first = serve(engine, range(4))
    prompt, params = first["3"][0], SamplingParams(temperature=0, max_tokens=9, logprobs=0, ignore_eos=True)
    engine.add_request("again", {"prompt_token_ids": prompt}, params)
    [output] = run(engine).values()
    assert output.num_cached_tokens > 32
    tokens, scores = output.prompt_token_ids + output.outputs[0].token_ids, output.outputs[0].logprobs
    expected = np.asarray(trained("llama", 1)(engine.params, jnp.array([tokens])))[0, -9:]
    np.testing.assert_array_equal(
        np.float32([at[t].logprob for at, t in zip(scores, tokens[-9:], strict=True)]), expected
    )


def test_what_was_guessed_has_the_same_bits():
    """Guessed tokens are lanes of a step: what is checked there is what would have been computed one by one."""
    speculator = NgramSpeculator(5, longest=3, shortest=1)
    engine = engines("llama")(enable_prefix_caching=False, speculator=speculator)
    few = [30, 80]  # of two tokens that may come, a guess is often right
    for seed, beside in enumerate(([], [], [0])):  # guesses need lanes to spare
        params = SamplingParams(seed=seed, max_tokens=50, allowed_token_ids=few, ignore_eos=True, logprobs=0)
        engine.add_request("few", {"prompt_token_ids": [7, 30, 80] * 9}, params)
        results = serve(engine, beside)
        tokens, logprobs = results.pop("few")
        expected = np.asarray(trained("llama", 1)(engine.params, jnp.array([tokens])))[0, -50:]
        np.testing.assert_array_equal(logprobs, expected)
        assert differences("llama", results) == 0
    assert speculator.num_accepted > 0


def test_without_the_mode_bits_differ():
    """Or the tests above would show nothing."""
    results = serve(engines("llama", mode=False)(enable_prefix_caching=False), range(len(REQUESTS)))
    assert differences("llama", results) > 0


def test_differentiated_programs_have_the_same_bits_and_the_ordinary_gradients():
    engine = engines("llama")()
    model, params = engine.runner.model, engine.params
    tokens = jnp.array([REQUESTS[5][0], REQUESTS[5][0][::-1]])

    def loss(model):
        def loss(params):
            logprobs = model.apply({"params": params}, tokens, method="token_logprobs")
            return -logprobs.mean(), logprobs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, logprobs), gradient = loss(model)(params)
    bits = jax.jit(lambda p: model.apply({"params": p}, tokens, method="token_logprobs"))(params)
    np.testing.assert_array_equal(logprobs, bits)
    _, ordinary = loss(model.clone(batch_invariant=False))(params)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(ordinary), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_rows_of_a_tile_are_alike():
    """Where in a tile a token is, and what is beside it, shows in no product of a model's sizes."""
    draw = np.random.default_rng(0)
    for inner, outer in [(64, 128), (576, 1536), (1536, 576), (100, 37)]:
        weights = jnp.array(draw.normal(size=(inner, outer)), jnp.float32)
        rows = jnp.array(draw.normal(size=(23, inner)), jnp.float32)
        multiply = jax.jit(lambda rows, weights: batch_invariant.in_tiles(lambda w, x: x @ w, 1, weights, rows))
        expected = np.asarray(multiply(rows, weights))
        for shift in (1, 7, 22):
            np.testing.assert_array_equal(multiply(rows[shift:], weights), expected[shift:])


@pytest.mark.parametrize("wrong", [{"block_size": 24}, {"tensor_parallel_size": 2}, {"kv_cache_dtype": "int8"}])
def test_what_cannot_be_invariant_is_refused(wrong):
    with pytest.raises(InvalidConfigError, match="batch_invariant needs"):
        LLM(model=str(GOLDENS / "models" / "llama"), batch_invariant=True, warmup=False, **wrong)
