"""A linear layer over a kernel and over a weight is the same layer, and a tree may hold either."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import checkpoints
from checkpoints.spelling import kernel_path
from jpaged import LLM, SamplingParams
from jpaged.models import registry
from jpaged.models.dense import Dense, feed_forward, unembed, with_kernels
from jpaged.snapshots import fingerprint
from tests.engine.support import GOLDENS

MODELS = GOLDENS / "models"
PROMPT = {"prompt_token_ids": [5 + 3 * i % 90 for i in range(21)]}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (64, 24), (2, 7, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_both_spellings_are_one_layer(shape, bias):
    layer, x = Dense(40, bias), jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"] | ({"bias": jnp.arange(40.0)} if bias else {})
    weights = {name: leaf for name, leaf in params.items() if name != "kernel"} | {"weight": params["kernel"].T}
    expected = nn.Dense(40, bias).apply({"params": params}, x)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), expected)
    np.testing.assert_allclose(layer.apply({"params": weights}, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 7, 24)])
def test_a_feed_forward_over_weights(shape):
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x):
            gate, up, down = Dense(40, name="gate"), Dense(40, name="up"), Dense(24, name="down")
            return feed_forward(x, [gate, up], lambda gate, up: nn.silu(gate) * up, down)

    x = jax.random.normal(jax.random.key(0), shape)
    params = Gated().init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that are not zero
    weights = {name: {"weight": one["kernel"].T, "bias": one["bias"]} for name, one in params.items()}
    np.testing.assert_allclose(
        Gated().apply({"params": weights}, x), Gated().apply({"params": params}, x), rtol=1e-5, atol=1e-5
    )


def test_logits_of_few_rows_are_those_of_many():
    hidden, embedding = (jax.random.normal(jax.random.key(i), (n, 48)) for i, n in enumerate((200, 300)))
    few, many = unembed(hidden[:3], embedding), unembed(hidden, embedding)
    assert few.shape == (3, 300)
    np.testing.assert_allclose(few, many[:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir() if (path / "config.json").is_file()))
def test_every_family_reads_its_weights_as_its_files_hold_them(name):
    plain = checkpoints.load(MODELS / name, skip_tokenizer=True)
    stored = checkpoints.load(MODELS / name, skip_tokenizer=True, as_stored=True)
    ours, theirs = flatten_dict(plain.params), flatten_dict(stored.params)
    assert {kernel_path(path) for path in theirs} == set(ours)
    for path, leaf in flatten_dict(with_kernels(stored.params)).items():
        np.testing.assert_array_equal(leaf, ours[path])
    assert fingerprint(stored.config, stored.params) == fingerprint(plain.config, plain.params)
    module, tokens = registry.build(plain.config, jnp.dtype("float32")), jnp.arange(12)[None] % 90
    forward = jax.jit(lambda params: module.apply({"params": params}, tokens, method="forward_logits"))
    np.testing.assert_allclose(forward(stored.params), forward(plain.params), rtol=1e-4, atol=1e-4)


def test_an_engine_takes_and_saves_either(tmp_path):
    folder = MODELS / "llama"
    plain = checkpoints.load(folder, skip_tokenizer=True)
    disk = LLM(model=folder, max_model_len=64, max_num_seqs=2, num_gpu_blocks_override=16, warmup=False)
    held = flatten_dict(disk.params)
    assert any(path[-1] == "weight" for path in held), "on CPU"
    tokens = disk.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    live = LLM(
        model=plain.config,
        params=disk.params,
        max_model_len=64,
        max_num_seqs=2,
        num_gpu_blocks_override=16,
        warmup=False,
    )
    assert all(leaf is held[path] for path, leaf in flatten_dict(live.params).items()), "not copied"
    assert live.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == tokens
    other = jax.tree.map(lambda leaf: leaf * 1.5, plain.params)
    disk.update_weights(other)  # kernels, where weights are served
    live.update_weights(jax.tree.map(lambda leaf: leaf * 1.5, disk.params))
    np.testing.assert_array_equal(
        disk.params["layers_0"]["mlp"]["up_proj"]["weight"], other["layers_0"]["mlp"]["up_proj"]["kernel"].T
    )
    checkpoints.save(tmp_path / "saved", plain.config, disk.params, format="safetensors")
    again = checkpoints.load(tmp_path / "saved", skip_tokenizer=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.tree.map(np.asarray, other))
    broken = disk.params | {"layers_0": {name: one for name, one in disk.params["layers_0"].items() if name != "mlp"}}
    with pytest.raises(checkpoints.MissingWeightsError, match=r"missing: layers_0/mlp/.*_proj/kernel"):
        disk.update_weights(broken)
