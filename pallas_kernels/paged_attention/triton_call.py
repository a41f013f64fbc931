"""`pallas_call` as the kernels of paged attention use it: over whole arrays, some of which may be absent."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def like(q: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that q varies over, which `shard_map` wants to be told."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)


def call(kernel, name: str, grid: tuple[int, ...], operands: tuple, results: tuple, *, aliased=0, interpret, **params):
    """pallas_call over whole arrays, of which some may be absent (None). The last `aliased` inputs are the results."""
    flat, structure = jax.tree.flatten(results)
    inputs = jax.tree.leaves(operands)
    unflatten = functools.partial(jax.tree.unflatten, jax.tree.structure((*operands, results)))
    out = pl.pallas_call(
        functools.partial(kernel, unflatten=unflatten),
        grid=grid,
        out_shape=flat,
        input_output_aliases={len(inputs) - aliased + i: i for i in range(aliased)},
        compiler_params=plgpu.CompilerParams(**params),
        interpret=interpret,
        name=name,
    )(*inputs)
    return jax.tree.unflatten(structure, out)
