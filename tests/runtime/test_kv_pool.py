"""KVPoolSpec: what a block costs."""

import jax
import jax.numpy as jnp

import checkpoints
from jpaged.runtime.kv_pool import KVPoolSpec
from tests.engine.support import GOLDENS


def spec_of(name: str) -> KVPoolSpec:
    config = checkpoints.load(GOLDENS / "models" / name, skip_tokenizer=True).config
    return KVPoolSpec.of(config, jnp.float32, num_blocks=3, block_size=4)


def test_a_pool_has_as_many_bytes_as_its_spec_says():
    for name in ("llama", "deepseek_v3"):
        spec = spec_of(name)
        assert spec.num_bytes == sum(kv.nbytes for kv in spec.allocate()) == 3 * spec.block_bytes
        assert [kv.shape for kv in jax.tree.leaves(spec.abstract())] == [kv.shape for kv in spec.allocate()]


def test_latents_are_stored_once():
    """DeepSeek's pool: one latent and one rotated key a token and layer, in one array for keys and values."""
    spec = spec_of("deepseek_v3")
    config = checkpoints.load(GOLDENS / "models" / "deepseek_v3", skip_tokenizer=True).config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert spec.layer_shape == (3, 1, 1, 4, width)
    assert spec.block_bytes == config.num_hidden_layers * 4 * width * 4
