"""Models of known shapes with random weights, made on the device: nothing is downloaded and nothing is read."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models.config import ModelConfig, config_from_hf
from jpaged.models.registry import build

SHAPES: dict[str, dict[str, Any]] = {  # from the models' config.json
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "opt-13b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 5120,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    },
}
_TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 256}
_TINY_OF = {
    "llama-3-8b": _TINY | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 512},
    "opt-13b": _TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 512},
}


def model_config(name: str, tiny: bool) -> ModelConfig:
    """The configuration of one of `SHAPES`, or of a tiny model of its family."""
    return config_from_hf(SHAPES[name] | (_TINY_OF[name] if tiny else {}))


def random_model(config: ModelConfig, dtype) -> tuple[nn.Module, dict[str, Any]]:
    """(module, parameters on the device): normal with a deviation of 0.02, one leaf at a time."""
    module = build(config, jnp.dtype(dtype))
    leaves, structure = jax.tree.flatten(abstract_params(module, dtype))
    make = jax.jit(_normal, static_argnums=(1, 2))
    made = [make(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return module, jax.tree.unflatten(structure, made)


def abstract_params(module: nn.Module, dtype) -> dict[str, Any]:
    """Shapes of a model's parameters, all of one dtype."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(
        lambda key, tokens: module.init(key, tokens, method="forward_logits"), jax.random.key(0), tokens
    )["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def bytes_read_per_step(config: ModelConfig, params: dict[str, Any]) -> int:
    """Bytes of weights that a step must read: all but the embeddings that are only looked up."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    looked_up = [name for name in params if name == "embed_positions"]
    if not config.tie_word_embeddings:
        looked_up.append("embed_tokens")
    return total - sum(leaf.nbytes for name in looked_up for leaf in jax.tree.leaves(params[name]))
