"""Engines over parameters that are in memory already: served where they are, or refused with everything that is wrong."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import checkpoints
from jpaged import LLM, LLMEngine, SamplingParams
from jpaged.errors import InvalidConfigError
from jpaged.models.registry import build
from jpaged.source import fit, flatten
from tests.engine.support import GOLDENS

FOLDER = GOLDENS / "models" / "llama"
SMALL = {"max_num_seqs": 2, "max_model_len": 64, "num_gpu_blocks_override": 32, "warmup": False}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints.load(FOLDER, skip_tokenizer=True)


@pytest.fixture(scope="module")
def params(checkpoint):
    return jax.tree.map(jnp.asarray, checkpoint.params)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def tokens(llm):
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_a_tree_is_served_where_it_is(checkpoint, params):
    expected = tokens(LLM(model=str(FOLDER), **SMALL))
    llm = LLM(model=checkpoint.config, params=params, **SMALL)
    assert pointers(llm.engine.runner.params) == pointers(params)
    assert tokens(llm) == expected
    module = build(checkpoint.config, jnp.dtype("float32"))
    assert tokens(LLM(model=module, params={"params": params}, **SMALL)) == expected
    assert tokens(LLM(model=checkpoint, **SMALL)) == expected


def test_another_dtype_is_cast(checkpoint, params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    engine = LLMEngine(model=checkpoint.config, params=half, **SMALL)
    assert pointers(engine.runner.params) == pointers(half), "auto serves what it is given"
    engine = LLMEngine(model=checkpoint.config, params=half, dtype="float32", **SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.runner.params)} == {jnp.dtype("float32")}
    assert engine.runner.spec.dtype == jnp.float32


def test_missing_surplus_and_misshapen_leaves_are_all_listed(checkpoint, params):
    broken = jax.tree.map(lambda leaf: leaf, params)
    del broken["norm"]
    broken["layers_1"]["mlp"]["up_proj"]["bias"] = jnp.zeros(3)
    broken["embed_tokens"]["embedding"] = jnp.zeros((2, 2))
    with pytest.raises(checkpoints.MissingWeightsError) as caught:
        LLM(model=checkpoint.config, params=broken, **SMALL)
    assert caught.value.missing == ("norm/scale",)
    assert caught.value.surplus == ("layers_1/mlp/up_proj/bias",)
    assert [name for name, *_ in caught.value.misshapen] == ["embed_tokens/embedding"]


def test_what_is_no_model_is_refused(checkpoint, params):
    with pytest.raises(InvalidConfigError, match="needs its parameters"):
        LLM(model=checkpoint.config, **SMALL)
    with pytest.raises(InvalidConfigError, match="a checkpoint has parameters"):
        LLM(model=checkpoint, params=params, **SMALL)
    with pytest.raises(InvalidConfigError, match="model is a int"):
        LLM(model=3, params=params, **SMALL)
    with pytest.raises(InvalidConfigError, match="not a list"):
        LLM(model=checkpoint.config, params=[params], **SMALL)
    whole = params | {"norm": {"scale": jnp.zeros(3, jnp.int32)}}
    with pytest.raises(InvalidConfigError, match="norm/scale is no array of floating-point"):
        LLM(model=checkpoint.config, params=whole, **SMALL)
    gone = params | {"norm": {"scale": jnp.zeros_like(params["norm"]["scale"])}}
    gone["norm"]["scale"].delete()
    with pytest.raises(InvalidConfigError, match="norm/scale has been deleted"):
        LLM(model=checkpoint.config, params=gone, **SMALL)


class Norm(nnx.Module):
    def __init__(self, scale):
        self.scale = nnx.Param(scale)
        self.calls = nnx.Variable(jnp.zeros(()))  # no parameter


class Tied(nnx.Module):
    def __init__(self, scale, embedding):
        self.norm, self.weight = Norm(scale), nnx.Param(embedding)


def test_nnx_states_count_as_trees_and_others_are_converted():
    scale, embedding = jnp.ones(4), jnp.zeros((3, 4))
    like = {"norm": {"scale": scale}}
    norm = nnx.Dict(norm=Norm(scale))
    _, state, _ = nnx.split(norm, nnx.Param, ...)
    for given in (norm, state):
        assert fit(flatten(given), like)["norm"]["scale"].unsafe_buffer_pointer() == scale.unsafe_buffer_pointer()

    def to_linen(model):
        return {"norm": {"scale": model.norm.scale[...]}, "embed_tokens": {"embedding": model.weight[...]}}

    leaves = flatten(Tied(scale, embedding), to_linen)
    assert leaves[("embed_tokens", "embedding")].unsafe_buffer_pointer() == embedding.unsafe_buffer_pointer()
    assert set(leaves) == {("embed_tokens", "embedding"), ("norm", "scale")}
