"""Tunix's rollout worker over jpaged, beside Tunix's own, and its checkpoints.

Skipped without google-tunix (`uv run --with google-tunix`).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tunix", reason="google-tunix is not installed")

from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout
from tunix.sft.checkpoint_manager import CheckpointManager

import checkpoints
from checkpoints.hf_config import config_to_hf
from jpaged.integrations.tunix import JpagedRollout
from jpaged.models.config import config_from_hf

PROMPTS = ["a page table", "copy on write", "x"]
SIZES = {"vocab_size": 131, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


class Bytes:
    """A tokenizer with Tunix's five methods: ASCII, and bos 128, eos 129, pad 130."""

    def encode(self, text, **_):
        return list(text.encode("ascii"))

    def decode(self, ids, **_):
        return bytes(i for i in ids if i < 128).decode("ascii")

    def bos_id(self):
        return 128

    def eos_id(self):
        return 129

    def pad_id(self):
        return 130


THEIR_CONFIG = llama3.ModelConfig(
    **SIZES, embed_dim=64, hidden_dim=128, rope_theta=10_000, norm_eps=1e-5, weight_tying=False
)


@pytest.fixture(scope="module")
def actor():
    return llama3.Llama3(
        THEIR_CONFIG, rngs=nnx.Rngs(3)
    )  # says 129, its end, and never 130, which Tunix takes for padding


@pytest.fixture(scope="module")
def config():
    return config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": SIZES["vocab_size"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "eos_token_id": 129,
        }
    )


@pytest.fixture(scope="module")
def ours(actor, config):
    return JpagedRollout(actor, Bytes(), config=config, rollout_config=GREEDY, max_num_seqs=4, warmup=False)


@pytest.fixture(scope="module")
def theirs(actor):
    return VanillaRollout(actor, Bytes(), CacheConfig(cache_size=128, num_layers=2, num_kv_heads=2, head_dim=16))


# Tunix is greedy if there is no top_p; with temperature 0 alone it divides by it.
GREEDY = RolloutConfig(
    max_tokens_to_generate=12, temperature=0.0, top_p=None, max_prompt_length=16, return_logprobs=True
)


def per_token(rollout, output):
    completions = np.full((len(PROMPTS), 12), 130, np.int32)
    for row, tokens in zip(completions, output.tokens, strict=True):
        row[: len(tokens)] = tokens
    return rollout.get_per_token_logps(jnp.array(output.left_padded_prompt_tokens), jnp.array(completions))


def agree(ours, theirs):
    mine, other = ours.generate(PROMPTS, GREEDY), theirs.generate(PROMPTS, GREEDY)
    for got, expected in zip(mine.tokens, other.tokens, strict=True):
        np.testing.assert_array_equal(got[: len(expected)], expected)
        assert list(got[len(expected) :]) in ([], [129]), "the end counts here: training must see it"
    np.testing.assert_array_equal(mine.left_padded_prompt_tokens, other.left_padded_prompt_tokens)
    scores = np.asarray(per_token(ours, mine))
    for row, logprobs, tokens in zip(scores, mine.logprobs, mine.tokens, strict=True):
        np.testing.assert_allclose(row[: len(tokens)], logprobs, atol=1e-4)
    for row, expected, tokens in zip(scores, np.asarray(per_token(theirs, mine)), mine.tokens, strict=True):
        np.testing.assert_allclose(row[: len(tokens)], expected[: len(tokens)], atol=1e-3)
    return mine


def test_it_says_what_tunix_says_before_and_after_an_update(actor, ours, theirs):
    before = agree(ours, theirs)
    state = jax.tree.map(lambda leaf: leaf * 1.3, nnx.state(actor, nnx.Param))
    ours.update_params(state)
    theirs.update_params(state)
    after = agree(ours, theirs)
    assert [list(t) for t in after.tokens] != [list(t) for t in before.tokens]
    assert ours.llm.engine.weights_version == 1
    assert ours.model() is actor


def test_equal_prompts_draw_differently_and_a_seed_repeats_them(ours):
    config = RolloutConfig(max_tokens_to_generate=12, temperature=1.0, max_prompt_length=16, seed=jax.random.key(5))
    first, again = (ours.generate(["same"] * 3, config) for _ in range(2))
    assert first.logprobs is None
    assert len({tuple(tokens) for tokens in first.tokens}) == 3
    assert [list(t) for t in again.tokens] == [list(t) for t in first.tokens]


def test_tunix_trains_with_it(config, tmp_path):
    """GRPO from end to end: rollouts follow the weights that Tunix has just trained."""
    small = llama3.ModelConfig(**SIZES, embed_dim=64, hidden_dim=128, rope_theta=10_000, norm_eps=1e-5)
    actor, reference = (llama3.Llama3(small, rngs=nnx.Rngs(1)) for _ in range(2))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rollouts = RolloutConfig(max_tokens_to_generate=8, temperature=1.0, max_prompt_length=16, kv_cache_size=64)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Bytes(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
            ),
            rollout_engine=functools.partial(JpagedRollout, config=config, max_num_seqs=4, warmup=False),
            rollout_config=rollouts,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(1e-2), eval_every_n_steps=100, max_steps=2
            ),
        ),
    )
    rewarded = []

    def reward(prompts, completions, **_):
        rewarded.append(len(completions))
        return [float(len(text)) for text in completions]

    learner = GRPOLearner(cluster, GRPOConfig(num_generations=2), reward)
    learner.train([{"prompts": np.array(PROMPTS[:2])}] * 2)
    assert rewarded == [4, 4]
    served = jax.tree.leaves(cluster.rollout.llm.params)
    cluster.rollout.generate(PROMPTS, rollouts)
    assert cluster.rollout.llm.engine.weights_version >= 1
    assert len(served) == len(jax.tree.leaves(nnx.state(cluster.rollout.model(), nnx.Param)))


def test_checkpoints_go_both_ways(config, tmp_path):
    """What Tunix saved, jpaged loads; what jpaged saved as its step 7, Tunix restores."""
    made, empty = (llama3.Llama3(THEIR_CONFIG, rngs=nnx.Rngs(seed)) for seed in (8, 9))
    manager = CheckpointManager(str(tmp_path / "theirs"))
    manager.save(1, made, force=True)
    manager.close()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    read = checkpoints.load(tmp_path / "theirs", skip_tokenizer=True)
    checkpoints.save(tmp_path / "ours" / "7", config, read.params, format="tunix")
    assert CheckpointManager(str(tmp_path / "ours")).maybe_restore(empty)[0] == 7
    jax.tree.map(np.testing.assert_array_equal, nnx.state(empty, nnx.Param), nnx.state(made, nnx.Param))
