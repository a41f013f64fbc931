"""Dispatch to experts against computing every expert."""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.moe import dispatch, softmax_top_k

TOKENS, EXPERTS, WIDTH, PER_TOKEN = 13, 5, 6, 2


def test_dispatch_equals_the_weighted_sum_over_all_experts():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    matrices = generator.normal(size=(EXPERTS, WIDTH, WIDTH)).astype(np.float32)
    biases = generator.normal(size=(EXPERTS, WIDTH)).astype(np.float32)
    logits = generator.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    chosen, weights = softmax_top_k(jnp.asarray(logits), PER_TOKEN, normalise=False)

    def run(rows, matmul, experts):
        return matmul(rows, jnp.asarray(matrices)) + jnp.asarray(biases)[experts]

    out = jax.jit(lambda x: dispatch(x, chosen, weights, EXPERTS, run))(x)
    every = np.einsum("te,xef->txf", x, matrices) + biases  # [T, X, E]
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-logits, axis=-1)[:, :PER_TOKEN]
    expected = sum(
        np.take_along_axis(share, best[:, i : i + 1], 1) * every[np.arange(TOKENS), best[:, i]]
        for i in range(PER_TOKEN)
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_normalised_weights_add_up_to_one():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, EXPERTS)))
    chosen, weights = softmax_top_k(logits, PER_TOKEN, normalise=True)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(chosen[:, 0], logits.argmax(-1))
