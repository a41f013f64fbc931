"""Reading prompts instead of continuing them: log-probabilities of given completions, and embeddings.

Both are requests for one token that nobody looks at. What is wanted is read off the prompt's hidden states while it is
computed: see `make_prompt_scores` and `pool_tiles` in jpaged/runtime/step.py.
"""

from collections.abc import Sequence

import numpy as np

from jpaged.engine import LLMEngine
from jpaged.errors import InvalidRequestError
from jpaged.outputs import RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence import Pooling, Readout
from jpaged.tokenization import Prompt, TokensPrompt, encode_prompt, encode_text

EMBEDDING = SamplingParams(temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
"""With the readout `pooled`."""
SCORING = SamplingParams(
    temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)
"""With the readout `scored`."""


def pooled(pooling: Pooling) -> Readout:
    """Of a request that wants an embedding, and no tokens."""
    return Readout(pooling=pooling, generates=False)


def scored(start: int) -> Readout:
    """Of a request that wants the log-probabilities of its prompt's tokens from a position on, and no tokens."""
    return Readout(scored_from=start, generates=False)


def with_completion(engine: LLMEngine, prompt: Prompt, completion: str | Sequence[int]) -> tuple[TokensPrompt, int]:
    """(prompt and completion as one prompt, where the completion begins).

    Args:
      completion: text, tokenised apart from its prompt and without special tokens, or token ids; not empty.

    Raises:
      InvalidRequestError: one of them can't be served, or is empty.
    """
    _, tokens, salt = encode_prompt(prompt, engine.tokenizer)
    engine.limits.check_prompt(tokens)
    if isinstance(completion, str):
        completion = encode_text(completion, engine.tokenizer, add_special_tokens=False)
    if not completion:
        raise InvalidRequestError("a completion is empty: there is nothing to score.")
    return {"prompt_token_ids": [*tokens, *completion], "cache_salt": salt}, len(tokens)


def logprobs_from(output: RequestOutput, start: int) -> list[float]:
    """Natural logarithms: those of the prompt's own tokens from a position on."""
    at = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)  # type: ignore[index]
    return [logprobs[token].logprob for token, logprobs in at]  # type: ignore[index]  # there is one from there on


def embedding_of(output: RequestOutput, normalize: bool) -> np.ndarray:
    """float32 [E]; of length 1 if `normalize`."""
    embedding: np.ndarray = output.embedding  # type: ignore[assignment]  # it was asked for
    return embedding / max(float(np.linalg.norm(embedding)), 1e-12) if normalize else embedding
