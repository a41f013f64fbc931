"""The examples that train: what they claim of the engine holds, in a few steps."""

import jax
import pytest

pytest.importorskip("optax", reason="the examples' group is not installed")

from docs.examples import grpo, train_and_serve


def test_the_reward_rises_and_rollouts_agree_with_training():
    lines = []
    rewards, gaps, llm = grpo.train(40, show=lines.append)
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5
    assert max(gaps) < 1e-4
    assert len(lines) == 40
    assert "gap" in lines[0]
    assert llm.engine.weights_version == 40, "the first rollout's are those that it began with"


def test_a_checkpoint_and_the_live_parameters_are_served_by_one_engine(tmp_path):
    shown = []
    losses, engine = train_and_serve.train_and_serve(tmp_path, 6, size=2, length=32, answer=16, show=shown.append)
    assert losses[-1] < losses[0]
    assert engine.weights_version == 1
    assert (tmp_path / "params").is_dir()
    assert train_and_serve.PROMPT in shown[-1]
    assert not engine.has_unfinished_requests()
    assert {type(leaf) for leaf in jax.tree.leaves(engine.params)} == {type(jax.numpy.zeros(1))}
