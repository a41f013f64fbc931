"""Reinforcement learning in one process: jpaged rolls out from the very arrays that optax updates.

    uv run --group examples python docs/examples/grpo.py

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1) on a toy: a prompt names a letter, and the reward of an answer is the
share of its tokens that are that letter. Each step draws a group of answers to each prompt with the current weights,
compares every answer with its group, and takes one gradient step. The model starts from nothing and learns to repeat.

The new weights are served without a copy and without a compile. The printed gap is the largest difference between what
the rollout and the training forward pass say of a token's log-probability: the ratio that GRPO clips starts at 1.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpaged import LLM, SamplingParams
from jpaged.models.config import LlamaConfig
from jpaged.models.registry import build

LETTERS = 16
CONFIG = LlamaConfig(
    model_type="llama",
    vocab_size=LETTERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
ANSWER = 12  # tokens
CLIP = 0.2


class Rollout(NamedTuple):
    """B answers, all of the same length."""

    tokens: np.ndarray  # int32 [B, prompt + ANSWER]
    logprobs: np.ndarray  # float32 [B, ANSWER]: of the answers' tokens when they were drawn
    rewards: np.ndarray  # float32 [B]
    advantages: np.ndarray  # float32 [B]


def reward(letter: int, answer: list[int]) -> float:
    return sum(token == letter for token in answer) / len(answer)


def roll_out(llm: LLM, params, letters: list[int], group: int, seed: int) -> Rollout:
    """`group` answers to the prompt of each letter, drawn with `params`."""
    prompts = [{"prompt_token_ids": [letter, letter]} for letter in letters]
    sampling = [
        SamplingParams(n=group, temperature=1, max_tokens=ANSWER, logprobs=0, seed=seed * LETTERS + i, ignore_eos=True)
        for i in range(len(letters))
    ]
    tokens, logprobs, rewards = [], [], []
    for letter, output in zip(letters, llm.generate(prompts, sampling, use_tqdm=False, params=params), strict=True):
        for answer in output.outputs:
            tokens.append(output.prompt_token_ids + answer.token_ids)
            logprobs.append([at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids, strict=True)])
            rewards.append(reward(letter, answer.token_ids))
    of_group = np.array(rewards, np.float32).reshape(len(letters), group)
    advantages = (of_group - of_group.mean(1, keepdims=True)) / (of_group.std(1, keepdims=True) + 1e-4)
    return Rollout(np.array(tokens, np.int32), np.array(logprobs, np.float32), of_group.ravel(), advantages.ravel())


def make_update(model, optimizer: optax.GradientTransformation):
    def loss(params, rollout: Rollout):
        logits = model.apply({"params": params}, rollout.tokens, method="forward_logits")
        scores = jax.nn.log_softmax(logits[:, -ANSWER - 1 : -1])
        logprobs = jnp.take_along_axis(scores, rollout.tokens[:, -ANSWER:, None], axis=-1)[..., 0]
        ratio, advantages = jnp.exp(logprobs - rollout.logprobs), rollout.advantages[:, None]
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
        return -gain.mean(), jnp.abs(logprobs - rollout.logprobs).max()

    @jax.jit  # the old parameters are not donated: they are being served
    def update(params, state, rollout: Rollout):
        gradients, gap = jax.grad(loss, has_aux=True)(params, rollout)
        changes, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, changes), state, gap

    return update


def train(steps: int, *, prompts: int = 4, group: int = 8, rate: float = 3e-3, show=print) -> tuple[list, list, LLM]:
    """Returns (mean reward of each step, train/rollout gap of each step, the engine with the last weights)."""
    model = build(CONFIG, jnp.dtype("float32"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="forward_logits")["params"]
    sizes = {"max_num_seqs": prompts * group, "max_model_len": 32, "num_gpu_blocks_override": 128}
    llm = LLM(model=model, params=params, warmup=False, **sizes)
    optimizer = optax.adam(rate)
    update, state = make_update(model, optimizer), optimizer.init(params)
    draw = np.random.default_rng(0)
    rewards, gaps = [], []
    for step in range(steps):
        letters = draw.choice(LETTERS, prompts, replace=False).tolist()
        rollout = roll_out(llm, params, letters, group, seed=step)
        params, state, gap = update(params, state, rollout)
        rewards.append(float(rollout.rewards.mean()))
        gaps.append(float(gap))
        show(f"step {step:3}   reward {rewards[-1]:.3f}   train/rollout gap {gaps[-1]:.1e}")
    llm.update_weights(params)
    return rewards, gaps, llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    train(parser.parse_args().steps)


if __name__ == "__main__":
    main()
