"""Embeddings are the pooled hidden states of the training forward pass, however the prompt came to be computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.errors import InvalidRequestError
from jpaged.sequence import Readout
from tests.engine.support import llm_of

LENGTHS = (1, 15, 16, 17, 50, 201)
"""Around the tile of 16, and longer than the step's 72 tokens."""


def prompt(length: int) -> dict:
    return {"prompt_token_ids": [(length + 7 * i) % 300 + 3 for i in range(length)]}


PROMPTS = [prompt(length) for length in LENGTHS]


def expected(engine, pooling: str) -> np.ndarray:
    """[prompts, E], by the forward pass that has no pool."""
    rows = []
    for one in PROMPTS:
        hidden, _ = engine.runner.model.apply({"params": engine.params}, jnp.array([one["prompt_token_ids"]]))
        rows.append(np.asarray(hidden[0, -1] if pooling == "last" else hidden[0].mean(0), np.float32))
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_dense_hidden_states(tiny, pooling):
    engine = tiny()
    llm, wanted = llm_of(engine), expected(engine, pooling)
    for _ in range(2):  # the second time everything is in the prefix cache
        got = llm.embed(PROMPTS, pooling=pooling, normalize=False)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
    assert (engine.blocks.stats.hits > 0) == (pooling == "last")
    unit = llm.embed(PROMPTS, pooling=pooling)
    np.testing.assert_allclose(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_prompts_are_embedded_all_the_same(tiny, pooling, mode):
    """Requests that grow take the blocks of a prompt that is half computed; it begins again, or comes back."""
    engine = tiny(num_blocks=65, swap_blocks=200, preemption_mode=mode, max_num_batched_tokens=24)
    llm, wanted = llm_of(engine), expected(engine, pooling)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    for i in range(2):
        engine.add_request(f"old {i}", prompt(8 + i), long)
    for _ in range(14):
        engine.step()
    got = llm.embed(PROMPTS[-1], pooling=pooling, normalize=False, use_tqdm=False)
    np.testing.assert_allclose(got, wanted[-1:], atol=1e-4, rtol=0)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.scheduler.num_preemptions > 0


def test_beside_generation_and_scoring(tiny):
    engine = tiny(enable_prefix_caching=False)
    llm, wanted = llm_of(engine), expected(engine, "mean")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [alone] = llm.generate(prompt(40), greedy)
    engine.add_request("beside", prompt(40), greedy)
    engine.add_request("scored", prompt(30), SamplingParams(max_tokens=1, prompt_logprobs=0))
    seen = {}
    engine.add_request("embedded", PROMPTS[4], SamplingParams(max_tokens=4, n=2), readout=Readout(pooling="mean"))
    while engine.has_unfinished_requests():
        seen |= {output.request_id: output for output in engine.step() if output.finished}
    np.testing.assert_allclose(seen["embedded"].embedding, wanted[4], atol=1e-4, rtol=0)
    assert seen["beside"].outputs[0].token_ids == alone.outputs[0].token_ids
    assert seen["beside"].embedding is None
    assert len(seen["scored"].prompt_logprobs) == 30


def test_what_can_not_be_embedded_is_refused(tiny):
    llm = llm_of(tiny())
    with pytest.raises(InvalidRequestError, match="pooling='max'"):
        llm.embed(PROMPTS, pooling="max")
    with pytest.raises(InvalidRequestError, match="at most 255"):
        llm.embed([prompt(3), prompt(256)])
    assert llm.engine.num_unfinished_requests == 0
    assert llm.embed([]).shape == (0, llm.engine.model_config.hidden_size)
