"""Every family against Hugging Face's numbers: as a training forward pass, and paged, in chunks and token by token."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from jpaged.models.config import FAMILIES
from jpaged.models.layout import PagedLayout
from jpaged.models.registry import MODULES, build
from jpaged.runtime.kv_pool import KVPoolSpec
from tests.engine.support import GOLDENS

BLOCK, CHUNK = 4, 8
WIDTH = 20  # blocks of a table: 80 tokens
GOLDEN_MODELS = sorted(path.parent.name for path in (GOLDENS / "models").glob("*/reference.npz"))


# What is slow here is the compiler, and nobody waits for the code it makes.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Golden:
    """A tiny model with random weights, and what Hugging Face makes of two prompts."""

    def __init__(self, name: str) -> None:
        folder = GOLDENS / "models" / name
        checkpoint = checkpoints.load(folder, skip_tokenizer=True)
        self.config, self.params = checkpoint.config, checkpoint.params
        self.model = build(checkpoint.config, jnp.float32)
        self.reference = np.load(folder / "reference.npz")
        self.tolerance = 1e-3 if self.config.rope is not None and self.config.rope.rope_type == "longrope" else 1e-4

    def of(self, prompt: str, what: str) -> np.ndarray:
        return self.reference[f"{prompt}_{what}"]

    def text(self, prompt: str) -> np.ndarray:
        """The prompt and the greedy tokens after it, but the last: what the model must see."""
        return np.concatenate([self.of(prompt, "input_ids"), self.of(prompt, "greedy_ids")[:-1]])

    def check(self, prompt: str, logits: np.ndarray) -> None:
        """`logits` after every token of `text`."""
        length = len(self.of(prompt, "input_ids"))
        np.testing.assert_allclose(logits[:length], self.of(prompt, "logits"), atol=self.tolerance, rtol=0)
        generated = logits[length - 1 :]
        np.testing.assert_array_equal(generated.argmax(-1), self.of(prompt, "greedy_ids"))
        logprobs = generated - np.log(np.exp(generated.astype(np.float64)).sum(-1, keepdims=True))
        ids = self.of(prompt, "top5_ids")
        np.testing.assert_array_equal(np.argsort(-logprobs, kind="stable")[:, :5], ids)
        ours = np.take_along_axis(logprobs, ids, axis=-1)
        np.testing.assert_allclose(ours, self.of(prompt, "top5_logprobs"), atol=1e-3, rtol=0)


@pytest.fixture(scope="module", params=GOLDEN_MODELS)
def golden(request):
    return Golden(request.param)


def test_every_family_has_a_module_and_a_golden_model():
    types = {
        json.loads((GOLDENS / "models" / name / "config.json").read_text())["model_type"] for name in GOLDEN_MODELS
    }
    assert set(MODULES) == set(FAMILIES) == types


def test_training_forward(golden):
    texts = [golden.text(prompt) for prompt in ("p0", "p1")]
    batch = np.zeros((2, max(map(len, texts))), np.int32)
    for row, text in zip(batch, texts, strict=True):
        row[: len(text)] = text
    forward = quick_jit(lambda p, t: golden.model.apply({"params": p}, t, method="forward_logits"))
    logits = np.asarray(forward(golden.params, batch))
    for row, text, prompt in zip(logits, texts, ("p0", "p1"), strict=True):
        golden.check(prompt, row[: len(text)])


def paged_step(golden):
    """One compiled step for both lanes: a decode row and a tile, either of which may be padding."""

    @quick_jit
    def step(params, pool, table, tokens, start, tile_length, decodes):
        tile = start + jnp.arange(CHUNK)
        positions = jnp.concatenate([start[None], tile])
        real = jnp.concatenate([decodes[None], jnp.arange(CHUNK) < tile_length])
        layout = PagedLayout(
            slots=jnp.where(real, table[positions // BLOCK] * BLOCK + positions % BLOCK, 0),
            decode_tables=table[None],
            decode_lengths=jnp.where(decodes, start + 1, 0)[None],
            prefill_tables=table[None],
            prefill_starts=start[None],
            prefill_lengths=tile_length[None],
        )
        hidden, pool = golden.model.apply({"params": params}, tokens, positions, pool, layout)
        return golden.model.apply({"params": params}, hidden, method="logits"), pool

    return step


def test_paged_in_chunks_then_token_by_token(golden):
    """Chunks of 8, the last one partial, then decoding from the model's own tokens; blocks in no order."""
    step = paged_step(golden)
    table = 1 + np.random.default_rng(0).permutation(WIDTH).astype(np.int32)
    for prompt in ("p0", "p1"):
        spec = KVPoolSpec.of(golden.config, jnp.float32, WIDTH + 1, BLOCK)
        pool = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec.abstract())
        tokens, logits = golden.of(prompt, "input_ids"), []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            padded = np.zeros(1 + CHUNK, np.int32)
            padded[1 : 1 + len(chunk)] = chunk
            out, pool = step(golden.params, pool, table, padded, np.int32(start), np.int32(len(chunk)), False)
            logits.append(np.asarray(out)[1 : 1 + len(chunk)])
        for position in range(len(tokens), len(tokens) + len(golden.of(prompt, "greedy_ids")) - 1):
            padded = np.zeros(1 + CHUNK, np.int32)
            padded[0] = logits[-1][-1].argmax()
            out, pool = step(golden.params, pool, table, padded, np.int32(position), np.int32(0), True)
            logits.append(np.asarray(out)[:1])
        golden.check(prompt, np.concatenate(logits))


def test_module_makes_the_tree_that_checkpoints_fill(golden):
    tokens = jnp.zeros((1, 3), jnp.int32)
    made = jax.eval_shape(lambda: golden.model.init(jax.random.key(0), tokens, method="forward_logits"))
    assert jax.tree.map(lambda x: x.shape, made["params"]) == jax.tree.map(lambda x: x.shape, golden.params)
