"""Linear layers, whose weights lie in memory as Flax has them or as files do.

    kernel [in, out]   x @ kernel           what Linen's `init` makes, and most trainers hold
    weight [out, in]   (weight @ x^T)^T     what safetensors and GGUF hold

Both are the same layer: the name of the leaf says which it is, and whatever takes a tree takes either. XLA:CPU
multiplies by YNNPACK, which packs the right operand before it multiplies, but reads the left one where it is: with the
activations on the right, a decode step reads its weights while it multiplies, and not before (docs/performance.md). So
on CPU an engine keeps the weights that it loads as the files have them. It serves a live tree as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from checkpoints.spelling import Path, kernel_path, turned

_FEW_ROWS = 64
"""Of logits: up to so many, a product with the embedding on its left is the faster one on CPU."""


class Dense(nn.Dense):
    """`nn.Dense`, over a `kernel` or a `weight`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:  # [..., in] -> [..., out]
        if not self.output_major:
            return super().__call__(inputs)
        rows = self.columns(inputs.reshape(-1, inputs.shape[-1])).T
        return rows.reshape(*inputs.shape[:-1], self.features)

    @property
    def output_major(self) -> bool:
        """Whether it has a `weight`."""
        return self.has_variable("params", "weight")

    def columns(self, inputs: jax.Array, *, of_columns: bool = False) -> jax.Array:
        """Over a `weight`, [T, in] -> [out, T]: a token is a column; of the input too, [in, T], with `of_columns`."""
        bias = self.get_variable("params", "bias") if self.use_bias else None
        weight: jax.Array | None = self.get_variable("params", "weight")
        inputs, weight, bias = nn.dtypes.promote_dtype(inputs, weight, bias, dtype=self.dtype)
        contract = self.dot_general or lax.dot_general
        # The barrier keeps XLA from turning the product around again.
        out = lax.optimization_barrier(contract(weight, inputs, (((1,), (0 if of_columns else 1,)), ((), ()))))
        return out if bias is None else out + bias[:, None]


def feed_forward(x: jax.Array, inner: Sequence[Dense], function: Callable[..., jax.Array], outer: Dense) -> jax.Array:
    """outer(function(*inner(x))), [..., E] -> [..., E], where `function` works on each number by itself.

    Over weights it does so on the columns as the products leave them, which nobody has to transpose.
    """
    if not all(dense.output_major for dense in (*inner, outer)):
        return outer(function(*(dense(x) for dense in inner)))
    rows = x.reshape(-1, x.shape[-1])
    hidden = lax.optimization_barrier(function(*(dense.columns(rows) for dense in inner)))  # [width, T]
    return outer.columns(hidden, of_columns=True).T.reshape(*x.shape[:-1], outer.features)


def float32_result(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
    """dot_general that accumulates and returns float32 whatever its inputs are."""
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, jnp.float32)


def unembed(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., E], by an embedding [V, E]."""
    if hidden.ndim == 2 and len(hidden) <= _FEW_ROWS and jax.default_backend() == "cpu":
        return lax.optimization_barrier(float32_result(embedding, hidden, (((1,), (1,)), ((), ())))).T
    return float32_result(hidden, embedding, (((hidden.ndim - 1,), (1,)), ((), ())))


def kernel(module: nn.Module, shape: tuple[int, int]) -> jax.Array:
    """The matrix [in, out] of a module that does more with it than multiply."""
    if module.has_variable("params", "weight"):
        return module.get_variable("params", "weight").T
    return module.param("kernel", nn.initializers.lecun_normal(), shape)


def with_kernels(params: Any) -> Any:
    """The tree without weights."""
    leaves = flatten_dict(params)
    return unflatten_dict({kernel_path(path): turned(path, leaf) for path, leaf in leaves.items()})


def spelled_like(leaves: Mapping[Path, Any], shapes: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s, with weights in place of kernels where `leaves` have them."""
    weights = {kernel_path(path): path for path in leaves if path[-1] == "weight"}

    def respell(path: Path, leaf: jax.ShapeDtypeStruct) -> tuple[Path, jax.ShapeDtypeStruct]:
        if path not in weights:
            return path, leaf
        return weights[path], jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)

    return unflatten_dict(dict(respell(path, leaf) for path, leaf in flatten_dict(shapes).items()))
