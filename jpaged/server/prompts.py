"""Prompts of requests: from text or token ids to tokens that fit into the context."""

import dataclasses
from typing import Any

from jpaged.engine import LLMEngine
from jpaged.sequence import Readout
from jpaged.server.errors import ApiError
from jpaged.tokenization import Prompt, encode_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt on its way to the engine."""

    text: str | None
    tokens: list[int]
    readout: Readout | None = None
    """What else is read off it."""


class Prompts:
    """Reads them.

    Args:
      engine: its tokenizer and its context are meant.
      max_prompts: most of one request.
    """

    def __init__(self, engine: LLMEngine, max_prompts: int) -> None:
        self._engine, self._max_prompts = engine, max_prompts

    def tokenize(self, prompts: Any, param: str) -> list[TokenizedPrompt]:
        """The prompts of a request, one or several, as text or token ids. Not for the event loop.

        Args:
          prompts: `protocol.Prompts`.
          param: the field that they are.

        Raises:
          ApiError, InvalidRequestError: they are none, too many, or can't be tokenised.
        """
        many = several(prompts)
        if not many:
            raise ApiError(400, f"{param} is an empty list.", param=param)
        if len(many) > self._max_prompts:
            raise ApiError(400, f"{len(many)} are too many; at most {self._max_prompts}.", param=param)
        tokenized = []
        for one in many:
            prompt: Prompt = one if isinstance(one, str) else {"prompt_token_ids": one}
            text, tokens, _ = encode_prompt(prompt, self._engine.tokenizer)
            tokenized.append(TokenizedPrompt(text=text, tokens=tokens))
        return tokenized

    def check_length(
        self, prompt: TokenizedPrompt, max_tokens: int | None = None, truncate_to: int | None = None
    ) -> TokenizedPrompt:
        """Cuts the prompt to its last tokens if that was asked for.

        Raises:
          ApiError: 400, prompt and max_tokens together are longer than the context.
        """
        tokens, most = prompt.tokens, self._engine.max_model_len
        if truncate_to is not None and len(tokens) > truncate_to:
            prompt = TokenizedPrompt(text=None, tokens=tokens[-truncate_to:])
        if len(prompt.tokens) + (max_tokens or 1) > most:
            raise ApiError(
                400,
                f"this model's maximum context length is {most} tokens; the prompt has {len(prompt.tokens)} and "
                f"{max_tokens or 1} more were asked for. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        return prompt


def several(prompts: Any) -> list[Any]:
    """`protocol.Prompts` as a list of them."""
    return [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
