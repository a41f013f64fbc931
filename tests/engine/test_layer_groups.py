"""Models whose layers alternate between windows and everything: each group of layers has blocks of its own, and the
tokens are Hugging Face's, whatever is cut, shared, found, copied, swapped or computed again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from jpaged import LLMEngine, SamplingParams
from jpaged.config import EngineConfig
from jpaged.models.config import FULL, SLIDING
from jpaged.models.registry import build
from tests.engine.support import GOLDENS, engine_factory, run

WINDOWS = {"gemma2": (None, 16, 16), "gemma3_text": (None, 16, 16), "gpt_oss": (None, 16)}
BLOCK, ROWS, CHUNK = 4, 8, 16
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5)


@pytest.fixture(scope="module", params=WINDOWS)
def model(request):
    """(reference, makes engines)."""
    folder = GOLDENS / "models" / request.param
    make = engine_factory(
        EngineConfig(
            model=str(folder),
            max_num_seqs=ROWS,
            max_model_len=80,
            max_num_batched_tokens=ROWS + CHUNK,
            num_gpu_blocks_override=160 * len(WINDOWS[request.param]),
            block_size=BLOCK,
            warmup=False,
        )
    )
    assert make().blocks.windows == WINDOWS[request.param]
    return np.load(folder / "reference.npz"), make


def prompt_of(reference, name):
    return {"prompt_token_ids": reference[f"{name}_input_ids"].tolist()}


def check(reference, name, completion):
    assert completion.token_ids == reference[f"{name}_greedy_ids"].tolist()
    top, values = reference[f"{name}_top5_ids"], reference[f"{name}_top5_logprobs"]
    for at, ids, expected in zip(completion.logprobs, top, values, strict=True):
        assert [at[int(token)].logprob for token in ids] == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("caching", [True, False])
def test_windows_give_back_their_blocks_and_nothing_else(model, caching):
    """Prompts in chunks, then tokens one by one: of a sequence of T tokens, layers without a window hold T / B blocks,
    those with one its length and a block on each side."""
    reference, make = model
    engine = make(enable_prefix_caching=caching)
    blocks, held = engine.blocks, []

    def look(step):
        position = engine.scheduler.batch.position
        for row in np.flatnonzero(position > 64):
            table = blocks.by_group[row, : blocks.counts[row] // blocks.num_groups]
            held.append((table > 0).sum(0).tolist())
            assert held[-1][0] == -(-int(position[row]) // BLOCK)

    for i in range(ROWS):
        engine.add_request(f"{i}", prompt_of(reference, f"p{i % 2}"), GREEDY)
    for i, output in run(engine, after_step=look).items():
        check(reference, f"p{int(i) % 2}", output.outputs[0])
    assert np.array(held).max(0)[1:].max() <= 16 // BLOCK + 2 < 64 // BLOCK


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted(model, mode, caching):
    """A pool that is too small for all, but not for one."""
    reference, make = model
    groups = make().blocks.num_groups
    engine = make(num_blocks=1 + 24 * groups, enable_prefix_caching=caching, swap_blocks=400, preemption_mode=mode)
    for i in range(ROWS):
        engine.add_request(f"{i}", prompt_of(reference, f"p{i % 2}"), GREEDY)
    for i, output in run(engine).items():
        check(reference, f"p{int(i) % 2}", output.outputs[0])
    assert engine.scheduler.num_preemptions > 0
    assert (engine.scheduler.num_swaps_in > 0) == (mode == "swap")


def test_a_prefix_is_found_where_every_group_has_what_it_needs(model):
    """The windows' blocks that were left behind are gone, and the prompt is found without them."""
    reference, make = model
    engine = make()
    prompt = prompt_of(reference, "p0")["prompt_token_ids"]
    text = prompt + reference["p0_greedy_ids"].tolist()
    engine.add_request("first", {"prompt_token_ids": prompt}, GREEDY)
    run(engine)
    for block in engine.blocks.allocator.cached_blocks()[: 2 * (engine.blocks.num_groups - 1)]:
        engine.blocks.cache.evict(block)
        engine.blocks.allocator._kept.discard(block)  # as if others had needed them
        del engine.blocks.allocator._cached[block]
        engine.blocks.allocator._free.append(block)
    one = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    engine.add_request("again", {"prompt_token_ids": text[:-8]}, one)
    output = run(engine)["again"]
    assert output.num_cached_tokens == (len(text) - 9) // BLOCK * BLOCK
    assert output.outputs[0].token_ids == text[-8:]


def test_samples_and_beams_share_and_copy(model):
    """Samples, and beams, with room to spare and with hardly any."""
    reference, make = model
    beams = SamplingParams(n=4, use_beam_search=True, temperature=0, max_tokens=24, ignore_eos=True)
    small, sampled = 1 + 34 * make().blocks.num_groups, []
    for settings in ({}, {"num_blocks": small, "swap_blocks": 400}, {"num_blocks": small}):
        engine = make(enable_prefix_caching=False, **settings)
        for seed in range(2):
            samples = SamplingParams(n=2, max_tokens=36, seed=seed, ignore_eos=True)
            engine.add_request(f"samples {seed}", prompt_of(reference, "p1"), samples)
        for prompt in ("p1", "p0"):
            engine.add_request(prompt, prompt_of(reference, prompt), beams)
        finished = run(engine)
        assert engine.blocks.num_copies > 0
        assert (engine.scheduler.num_preemptions > 0) == bool(settings)
        for prompt in ("p0", "p1"):
            found = [completion.token_ids for completion in finished[prompt].outputs]
            assert found == reference[f"{prompt}_beam_ids"].tolist()
        sampled.append([[c.token_ids for c in finished[f"samples {seed}"].outputs] for seed in range(2)])
    assert sampled[0] == sampled[1] == sampled[2]


def test_no_step_copies_the_pool(model):
    """One array after the other is written by a layer of each group, in place."""
    engine = model[1]()
    spec = engine.runner.spec
    shape = f"f32[{','.join(map(str, spec.layer_shape))}]"
    for bucket in (engine.scheduler.buckets[0], engine.scheduler.buckets[-1]):
        programs = engine.runner.compile_forward(bucket).programs
        assert not [line for p in programs for line in p.as_text().splitlines() if shape in line and " copy(" in line]
        assert sum(p.memory_analysis().alias_size_in_bytes for p in programs) >= spec.num_bytes


def test_more_layers_than_a_piece():
    """Fourteen layers of Gemma 3 in seven groups of two: steps in pieces write the pool's two arrays in place, and the
    tokens are those of the training forward pass."""
    checkpoint = checkpoints.load(GOLDENS / "models" / "gemma3_text", skip_tokenizer=True)
    types = tuple(FULL if index % 6 == 5 else SLIDING for index in range(14))
    config = dataclasses.replace(checkpoint.config, num_hidden_layers=14, layer_types=types)
    model = build(config, jnp.dtype("float32"))
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), int), method="forward_logits"))(jax.random.key(3))
    engine = LLMEngine(model=model, params=params, max_num_seqs=2, max_model_len=64, block_size=4, warmup=False)
    assert engine.blocks.windows == (None, *[16] * 6)
    pointers = [array.unsafe_buffer_pointer() for array in engine.runner.pool]
    assert len(pointers) == 2
    prompt = list(range(5, 28))
    engine.add_request("a", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    text = prompt + list(run(engine)["a"].outputs[0].token_ids)
    logits = jax.jit(lambda p, t: model.apply(p, t, method="forward_logits"))(params, jnp.array([text]))
    assert np.asarray(logits)[0, 22:-1].argmax(-1).tolist() == text[23:]
    assert [array.unsafe_buffer_pointer() for array in engine.runner.pool] == pointers
