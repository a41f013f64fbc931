"""How far rollouts are from training: max |log p(training forward) - log p(paged decode)| over sampled tokens.

python -m benchmarks.train_serve_gap --model smollm2-135m --tokens 10000   # and --batch-invariant, where it is 0
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import LLM, SamplingParams

LENGTH = 128  # sampled tokens of a request


def gaps(llm: LLM, tokens: int) -> np.ndarray:
    """|difference| of each sampled token's log-probability, float32 [tokens or a little more]."""
    engine = llm.engine
    vocab, length = engine.model_config.vocab_size, min(LENGTH, engine.max_model_len - 32)
    draw = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": draw.integers(0, vocab, 17).tolist()} for _ in range(-(-tokens // length))]
    sampling = [SamplingParams(max_tokens=length, seed=i, logprobs=0, ignore_eos=True) for i in range(len(prompts))]

    @jax.jit
    def forward(params, tokens):
        return engine.runner.model.apply({"params": params}, tokens, method="token_logprobs")[0]

    found = []
    for output in llm.generate(prompts, sampling):
        [answer] = output.outputs
        rolled = [at[token].logprob for at, token in zip(answer.logprobs or (), answer.token_ids, strict=True)]
        whole = jnp.array([output.prompt_token_ids + answer.token_ids])
        found.append(np.abs(np.asarray(forward(llm.params, whole))[-len(rolled) :] - np.array(rolled, np.float32)))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--batch-invariant", action="store_true")
    arguments = parser.parse_args()
    invariant = arguments.batch_invariant
    llm = LLM(model=arguments.model, dtype="float32", max_model_len=256, warmup=False, batch_invariant=invariant)
    found = gaps(llm, arguments.tokens)
    found_in = {"model": arguments.model, "batch_invariant": invariant, "tokens": len(found)}
    print(json.dumps(found_in | {"max": float(found.max()), "mean": float(found.mean())}))


if __name__ == "__main__":
    main()
