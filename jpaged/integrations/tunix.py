"""Rollouts for Tunix: `ClusterConfig(rollout_engine=functools.partial(JpagedRollout, config=..., max_num_seqs=64))`.

Tunix trains an NNX model; this serves its parameters as they are at each call. Needs google-tunix.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.rl import reshard
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

import checkpoints
from jpaged.llm import LLM
from jpaged.models.config import ModelConfig
from jpaged.sampling_params import SamplingParams

_SEEDS = 1 << 32


class JpagedRollout(BaseRollout):
    """Tunix's rollout worker, over an `LLM`.

    Log-probabilities are the model's own, whatever temperature, top_k and top_p were sampled with.

    Args:
      rollout_actor: the model that Tunix trains or updates, of a family that `checkpoints.to_linen` knows.
      tokenizer: Tunix's `TokenizerAdapter`, or what it may wrap.
      config: the model's configuration, ours: of `checkpoints.read_config`, or `jpaged.models.config.config_from_hf`.
      rollout_config: Tunix's; max_prompt_length and max_tokens_to_generate limit a sequence.
      mesh: of Tunix; parameters are served where they lie.
      **arguments: of `LLM`.
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        *,
        config: ModelConfig,
        rollout_config: RolloutConfig | None = None,
        mesh: Any = None,
        **arguments: Any,
    ) -> None:
        self._actor = rollout_actor
        self._tokenizer = tokenizer if isinstance(tokenizer, TokenizerAdapter) else TokenizerAdapter(tokenizer)
        if rollout_config is not None:
            longest = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
            arguments.setdefault("max_model_len", min(longest, config.max_position_embeddings))
        self._served = jax.tree.leaves(self._state())
        self.llm = LLM(
            model=config,
            params=self._state(),
            to_linen=lambda state: checkpoints.to_linen(config, nnx.to_pure_dict(state)),
            **arguments,
        )
        self._logprobs = jax.jit(
            functools.partial(self.llm.engine.runner.model.apply, method="token_logprobs")  # type: ignore[arg-type]
        )
        self._calls = 0

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """Continues prompts, all as one batch. Prompts that are longer than max_prompt_length keep their ends."""
        self._serve_what_is_trained()
        width = rollout_config.max_prompt_length
        tokens = [self._tokens(prompt)[-width:] for prompt in prompts]
        outputs = self.llm.generate(
            [{"prompt_token_ids": known} for known in tokens],
            [self._sampling(rollout_config, index) for index in range(len(prompts))],
            use_tqdm=False,
        )
        self._calls += 1
        answers = [output.outputs[0] for output in outputs]
        logprobs = None
        if rollout_config.return_logprobs:
            logprobs = [
                np.array([at[t].logprob for at, t in zip(answer.logprobs or (), answer.token_ids, strict=True)], "f4")
                for answer in answers
            ]
        return RolloutOutput(
            text=[self._tokenizer.decode(list(answer.token_ids)) for answer in answers],
            logits=[],
            tokens=[np.array(answer.token_ids, np.int32) for answer in answers],
            left_padded_prompt_tokens=np.array([[self.pad_id()] * (width - len(t)) + t for t in tokens], np.int32),
            logprobs=logprobs,
        )

    def _tokens(self, prompt: str) -> list[int]:
        bos = self._tokenizer.bos_id()
        return list(self._tokenizer.dedup_bos_ids(([bos] if bos else []) + list(self._tokenizer.encode(prompt))))

    def _sampling(self, config: RolloutConfig, index: int) -> SamplingParams:
        """Equal prompts of one call draw differently, and so do calls, unless a seed says that they are to be alike."""
        seed = config.seed
        if seed is not None and jnp.issubdtype(jnp.result_type(seed), jax.dtypes.prng_key):
            seed = jax.random.key_data(seed)
        return SamplingParams(
            max_tokens=config.max_tokens_to_generate,
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=max(config.top_k or 0, 0),
            seed=(self._calls if seed is None else int(np.ravel(seed)[-1])) * _SEEDS + index,
            stop_token_ids=list(config.eos_tokens or [self.eos_id()]),
            logprobs=0 if config.return_logprobs else None,
            detokenize=False,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """Log-probabilities of completions [B, C] after left-padded prompts [B, P]: float32 [B, C]."""
        self._serve_what_is_trained()
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        width = completions.shape[1]
        starts = (prompts != self.pad_id()).argmax(axis=1)
        rows = np.concatenate([prompts, completions], axis=1)
        # Padding goes to the right, where causal attention does not see it.
        whole = np.stack([np.roll(row, -start) for row, start in zip(rows, starts, strict=True)])
        scores = self._logprobs({"params": self.llm.params}, jnp.asarray(whole))
        first = prompts.shape[1] - starts - 1  # a token's score stands one place before it
        return jnp.take_along_axis(scores, first[:, None] + np.arange(width), axis=1)

    def update_params(self, params: Any, filter_types: Sequence[Any] | None = None) -> None:
        """Puts parameters into the model; those that are not mentioned stay."""
        if filter_types is not None:
            params = reshard.reshard_pytree(params, nnx.state(self._actor, tuple(filter_types)))
        nnx.update(self._actor, params)

    def _state(self) -> nnx.State:
        return nnx.state(self._actor, nnx.Param)

    def _serve_what_is_trained(self) -> None:
        """A trainer that shares the model changes it without a word."""
        state = self._state()
        leaves = jax.tree.leaves(state)
        if any(new is not old for new, old in zip(leaves, self._served, strict=True)):
            self.llm.update_weights(state)
            self._served = leaves

    def pad_id(self) -> int:
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._tokenizer.eos_id()

    def model(self) -> nnx.Module:
        return self._actor
