"""Another project's model beside ours: the same parameters, the same logits."""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.registry import build

TOKENS = np.random.default_rng(0).integers(10, 160, 24)
"""One sequence. Small numbers mean something to some: 0 is gemma's padding."""


def disturbed(params):
    """No norm is as it began, and no bias zero. MaxText rounds a tied embedding to bfloat16 when it is the head."""
    draw = np.random.default_rng(1)

    def leaf(path, x):
        x = x + jnp.asarray(0.05 * draw.standard_normal(x.shape), x.dtype)
        return x.astype(jnp.bfloat16).astype(x.dtype) if path[-1].key == "embedding" else x

    return jax.tree.map_with_path(leaf, params)


def our_params(config):
    """Random ones."""
    model = build(config, jnp.dtype("float32"))
    return disturbed(model.init(jax.random.key(2), TOKENS[None], method="forward_logits")["params"])


def our_logits(config, params) -> np.ndarray:
    """Of TOKENS, float32 [24, V]."""
    model = build(config, jnp.dtype("float32"))
    return np.asarray(model.apply({"params": params}, TOKENS[None], method="forward_logits"))[0]


def assert_alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
