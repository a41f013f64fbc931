"""The grouped matmul against a loop over groups, on any cut of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import _ragged, grouped_matmul

ROWS, GROUPS, IN, OUT = 40, 6, 5, 7

matmul = jax.jit(grouped_matmul)


def operands(seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(ROWS, IN)).astype(dtype), generator.normal(size=(GROUPS, IN, OUT)).astype(dtype)


def group_by_group(x, weights, sizes):
    ends = np.cumsum(sizes)
    return np.concatenate([x[e - s : e] @ w for s, e, w in zip(sizes, ends, weights, strict=True)])


@st.composite
def cuts(draw):
    ends = sorted(draw(st.lists(st.integers(0, ROWS), min_size=GROUPS - 1, max_size=GROUPS - 1)))
    return np.diff([0, *ends, ROWS]).astype(np.int32)


@settings(max_examples=60)
@given(cuts(), st.integers(0, 5))
def test_any_cut(sizes, seed):
    x, weights = operands(seed)
    np.testing.assert_allclose(matmul(x, weights, sizes), group_by_group(x, weights, sizes), atol=1e-5)


def test_groups_without_rows_are_not_read():
    """Or their NaN would show: a product of all rows with all matrices, masked, multiplies NaN by zero."""
    x, weights = operands()
    weights[[0, 3, 5]] = np.nan
    sizes = np.array([0, 25, 10, 0, 5, 0], np.int32)
    assert np.isfinite(matmul(x, weights, sizes)).all()


def test_gradients_are_those_of_ragged_dot():
    x, weights = operands()
    sizes = jnp.array([9, 0, 21, 3, 7, 0])
    ours = jax.grad(lambda x, w: jnp.sin(grouped_matmul(x, w, sizes)).sum(), (0, 1))(x, weights)
    theirs = jax.grad(lambda x, w: jnp.sin(_ragged(x, w, sizes)).sum(), (0, 1))(x, weights)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_in_float32(dtype):
    x, weights = (jnp.asarray(array, dtype) for array in operands())
    sizes = np.array([5, 5, 5, 5, 10, 10], np.int32)
    out = matmul(x, weights, sizes)
    assert out.dtype == dtype
    exact = group_by_group(np.asarray(x, np.float32), np.asarray(weights, np.float32), sizes)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=1e-2, atol=1e-2)
