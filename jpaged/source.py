"""Where a model comes from: a checkpoint on disk, or live parameters that somebody has in memory already.

    LLM(model="smollm2-135m")                  on disk
    LLM(model=checkpoint)                      read by `checkpoints.load`, or made
    LLM(model=config, params=tree)             a configuration of `jpaged.models.config`, any tree of its parameters
    LLM(model=module, params=tree)             a Linen module of `jpaged.models`

A tree is what Linen trains: a nested dict, bare or under "params", boxed (`nn.Partitioned`) or not. An NNX model or
state counts as one if its keys are the same; if they are not, `to_linen` makes a tree of it.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import checkpoints
from checkpoints.leaves import check_tensors
from checkpoints.spelling import Path, kernel_path, kernel_shape, respelled
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError
from jpaged.models import registry
from jpaged.models.config import ModelConfig
from jpaged.models.dense import spelled_like
from jpaged.models.sharding import param_shardings, tensor_mesh
from jpaged.progress import Progress

Params = dict[str, Any]
"""Nested dict of arrays."""

ToLinen = Callable[[Any], Any]
"""Makes the tree of the served module of what the caller has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """How `jpaged.startup.build` gets a model."""

    load: Callable[[jnp.dtype], checkpoints.Checkpoint]
    """The model, with parameters of that dtype."""
    module: Callable[[ModelConfig, jnp.dtype], nn.Module] = registry.build
    dtype: jnp.dtype | None = None
    """What the parameters are now: what dtype="auto" means. None: whatever is asked for."""
    to_linen: ToLinen | None = None


def on_disk(config: EngineConfig) -> Source:
    """The model that the configuration names; on several devices, each reads its part of the parameters."""

    def load(dtype: jnp.dtype) -> checkpoints.Checkpoint:
        with Progress("loading weights", unit="B") as progress:
            return checkpoints.load(
                config.model,
                dtype=dtype.name,
                revision=config.revision,
                tokenizer=config.tokenizer,
                sharding=_sharding(config),
                as_stored=_keeps_weights(config),
                progress=progress.weights,
            )

    return Source(load=load)


def _keeps_weights(config: EngineConfig) -> bool:
    """Whether products with [out, in] are the faster ones, and nobody asks for the bits of a training forward pass."""
    return jax.default_backend() == "cpu" and config.tensor_parallel_size == 1 and not config.batch_invariant


def _sharding(config: EngineConfig) -> Callable[..., jax.sharding.NamedSharding] | None:
    """Where each parameter goes; None for one device. A model that can't be divided is refused before it is read."""
    if config.tensor_parallel_size == 1:
        return None
    model = checkpoints.read_config(config.model, revision=config.revision)
    mesh = tensor_mesh(config.tensor_parallel_size, model)
    return None if mesh is None else param_shardings(model, mesh)


def of_arguments(
    model: Any = None, params: Any = None, tokenizer: Any = None, to_linen: ToLinen | None = None, **arguments
) -> tuple[EngineConfig, Source | None]:
    """The configuration that an engine's keyword arguments make, and where the model comes from if not from disk.

    Raises: as `live` and `EngineConfig`.
    """
    if params is None and (model is None or isinstance(model, str | os.PathLike)):
        named: dict[str, Any] = {} if model is None else {"model": os.fspath(model)}
        return EngineConfig(tokenizer=tokenizer, **named, **arguments), None
    source = live(model, params, tokenizer, to_linen)
    return EngineConfig(model="live", **arguments), source


def live(model: Any, params: Any = None, tokenizer: Any = None, to_linen: ToLinen | None = None) -> Source:
    """A model whose parameters are in memory.

    Args:
      model: a `ModelConfig`, a module of `jpaged.models`, or a checkpoint: anything with `config`, `params` and
        `tokenizer`.
      params: its parameters; not with a checkpoint. They are served where they are, without a copy, if they have the
        dtype that is served and lie on the device; else they are cast, or moved. NumPy arrays must not change later.
      tokenizer: None: the checkpoint's own, or none: prompts are token ids.
      to_linen: makes a Linen tree of `params`, and of what `update_weights` is given later.

    Raises:
      InvalidConfigError: `model` is nothing of these, or parameters are given twice or not at all.
    """
    module, dtype = registry.build, None
    if isinstance(model, ModelConfig):
        config = model
    elif isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), ModelConfig):
        config, dtype = model.config, jnp.dtype(model.dtype)
        module = functools.partial(_clone, model)
    elif hasattr(model, "config") and hasattr(model, "params"):
        if params is not None:
            raise InvalidConfigError("a checkpoint has parameters: pass its config as model to serve other ones.")
        config, params, tokenizer = model.config, model.params, tokenizer or model.tokenizer
    else:
        raise InvalidConfigError(
            f"model is a {type(model).__name__}: pass a name or a path, a ModelConfig, a module of jpaged.models with "
            "its params, or a checkpoint."
        )
    if params is None:
        raise InvalidConfigError("a model that is not on disk needs its parameters: pass params=.")
    leaves = flatten(params, to_linen)
    generation_config = getattr(model, "generation_config", {})

    def load(dtype: jnp.dtype) -> checkpoints.Checkpoint:
        init = functools.partial(module(config, dtype).init, method="forward_logits")
        like = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nn.meta.unbox(like))
        like = spelled_like(leaves, like)
        return checkpoints.Checkpoint(
            config=config,
            params=fit(leaves, like),
            tokenizer=tokenizer,
            generation_config=generation_config,
            source="live parameters",
        )

    return Source(load=load, module=module, dtype=dtype or _common_dtype(leaves), to_linen=to_linen)


def _clone(model: nn.Module, config: ModelConfig, dtype: jnp.dtype) -> nn.Module:
    return model.clone(config=config, dtype=dtype)


def _common_dtype(leaves: dict[tuple, Any]) -> jnp.dtype | None:
    """That of all leaves, if it is one that can be served."""
    dtypes = {jnp.dtype(leaf.dtype) for leaf in leaves.values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {jnp.dtype("float32"), jnp.dtype("bfloat16")} else None


def flatten(params: Any, to_linen: ToLinen | None = None) -> dict[Path, Any]:
    """The leaves of what a caller calls parameters, by their path in the Linen tree.

    Raises:
      InvalidConfigError: it is no tree of arrays.
    """
    tree = params if to_linen is None else to_linen(params)
    if "flax.nnx" in sys.modules:  # whoever has an NNX model has imported it; nobody else waits for half a second
        tree = _without_nnx(tree)
    if not isinstance(tree, Mapping):
        raise InvalidConfigError(f"params must be a nested dict or an NNX model or state, not a {type(tree).__name__}.")
    if set(tree) == {"params"}:  # what `init` returns
        tree = tree["params"]
    leaves = {tuple(map(str, path)): leaf for path, leaf in flatten_dict(nn.meta.unbox(dict(tree))).items()}
    for path, leaf in leaves.items():
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise InvalidConfigError(f"params: {'/'.join(path)} is no array of floating-point numbers.")
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise InvalidConfigError(
                f"params: {'/'.join(path)} has been deleted: a jitted function that took it as a donated argument "
                "has used its memory for something else. Pass what that function returned."
            )
    return leaves


def _without_nnx(tree: Any) -> Any:
    from flax import nnx

    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def fit(leaves: dict[Path, Any], like: Params) -> Params:
    """The tree `like`, with other leaves: those that have the dtype and the place already as they are, the rest moved.

    Args:
      leaves: as `flatten` returns them.
      like: arrays, or `jax.ShapeDtypeStruct`s, whose sharding may be None: anywhere.

    Raises:
      MissingWeightsError: leaves are missing, surplus or misshapen; all of them are listed.
    """
    wanted = flatten_dict(like)
    check_tensors("params", _shapes(wanted), _shapes(leaves))
    found = {path: leaves[path] if path in leaves else leaves[respelled(path)].T for path in wanted}
    return unflatten_dict({path: _placed(found[path], leaf) for path, leaf in wanted.items()})


def _shapes(leaves: Mapping[Path, Any]) -> dict[str, tuple[int, ...]]:
    """By name, of the kernels where there are weights."""
    return {"/".join(kernel_path(path)): kernel_shape(path, leaf.shape) for path, leaf in leaves.items()}


def _placed(leaf: Any, like: Any) -> jax.Array:
    if leaf.dtype != like.dtype:
        leaf = leaf.astype(like.dtype)
    where = like.sharding
    if isinstance(leaf, jax.Array) and (where is None or leaf.sharding.is_equivalent_to(where, leaf.ndim)):
        return leaf
    return jax.device_put(leaf, where)
