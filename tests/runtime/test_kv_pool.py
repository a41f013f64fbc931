"""KVPoolSpec: what a block costs."""

import jax
import jax.numpy as jnp
import pytest

import checkpoints
from jpaged.errors import InvalidConfigError
from jpaged.runtime.kv_pool import KVPoolSpec, blocks_in_budget, pool_dtype
from tests.engine.support import GOLDENS


def spec_of(name: str, dtype=jnp.float32) -> KVPoolSpec:
    config = checkpoints.load(GOLDENS / "models" / name, skip_tokenizer=True).config
    return KVPoolSpec.of(config, dtype, num_blocks=3, block_size=4)


def test_a_pool_has_as_many_bytes_as_its_spec_says():
    for name, dtype in (("llama", jnp.float32), ("deepseek_v3", jnp.float32), ("llama", jnp.int8)):
        spec = spec_of(name, dtype)
        arrays = jax.tree.leaves(spec.allocate())
        assert spec.num_bytes == sum(array.nbytes for array in arrays) == 3 * spec.block_bytes
        abstract = jax.tree.leaves(spec.abstract())
        assert [(x.shape, x.dtype) for x in abstract] == [(x.shape, x.dtype) for x in arrays]


def test_latents_are_stored_once():
    """DeepSeek's pool: one latent and one rotated key a token and layer, in one array for keys and values."""
    spec = spec_of("deepseek_v3")
    config = checkpoints.load(GOLDENS / "models" / "deepseek_v3", skip_tokenizer=True).config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert spec.layer_shape == (3, 1, 1, 4, width)
    assert spec.block_bytes == config.num_hidden_layers * 4 * width * 4


def test_quantised_blocks_take_half_of_bfloat16_and_their_scales():
    wide, small = spec_of("llama", jnp.bfloat16), spec_of("llama", jnp.float8_e4m3fn)
    vectors = 2 * wide.num_arrays * wide.block_size * wide.num_kv_heads
    assert small.block_bytes == wide.block_bytes // 2 + 4 * vectors
    budget = 1000 * wide.block_bytes
    assert blocks_in_budget(budget, small, 10**6) == budget // small.block_bytes > 1000


def test_latents_are_not_quantised():
    config = checkpoints.load(GOLDENS / "models" / "deepseek_v3", skip_tokenizer=True).config
    with pytest.raises(InvalidConfigError, match="kv_cache_dtype='int8' is not for multi-head latent attention"):
        pool_dtype("int8", config, jnp.dtype("float32"))
    assert pool_dtype("auto", config, jnp.dtype("float32")) == jnp.float32
