"""RequestLimits: what this model, tokenizer and device state can serve. Asked once, when a request arrives."""

import dataclasses
from typing import TYPE_CHECKING

from jpaged.errors import InvalidRequestError
from jpaged.runtime.state import MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_SUPPRESSED
from jpaged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

MAX_CANDIDATES = 1024
"""Continuations that a beam search looks at in a step."""


@dataclasses.dataclass(frozen=True, slots=True)
class RequestLimits:
    """Checks prompts and sampling parameters against an engine."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    tokenizer: "Tokenizer | None"

    def check_prompt(self, tokens: list[int]) -> None:
        """Raises InvalidRequestError unless the tokens can be a prompt."""
        vocab = self.vocab_size
        if not tokens:
            raise InvalidRequestError(
                "the prompt is empty: there is nothing to continue from. Pass at least one token."
            )
        if len(tokens) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(tokens)} tokens, and with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer: shorten it or raise max_model_len."
            )
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidRequestError(f"token id {token!r} lies outside the vocabulary [0, {vocab}).")

    def check_params(self, params: SamplingParams) -> None:
        """Raises InvalidRequestError unless the engine can follow the parameters."""
        vocab = self.vocab_size
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(params, name) or ():
                if token >= vocab:
                    raise InvalidRequestError(f"{name}: token id {token} lies outside the vocabulary [0, {vocab}).")
        if (params.stop or params.bad_words) and self.tokenizer is None:
            raise InvalidRequestError("stop strings and bad_words need a tokenizer, and this engine has none.")
        stops = self.eos_token_ids | set(params.stop_token_ids)
        if params.use_beam_search and params.num_sequences * (1 + len(stops)) > MAX_CANDIDATES:
            raise InvalidRequestError(
                f"{params.num_sequences} beams with {len(stops)} ways to end are too many: their product may be "
                f"{MAX_CANDIDATES}. Use fewer stop_token_ids or fewer beams."
            )
        if len(stops) > MAX_SUPPRESSED:
            raise InvalidRequestError(f"{len(stops)} stop tokens are too many; at most {MAX_SUPPRESSED}.")
        words = self.bad_words(params)
        if params.allowed_token_ids is not None:
            left = set(params.allowed_token_ids) - {w[0] for w in words if len(w) == 1}
            if not left - (stops if params.min_tokens else set()):
                raise InvalidRequestError(
                    "allowed_token_ids, bad_words and min_tokens together leave no token to generate."
                )

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The token sequences of the request's bad words, each with and without a leading space."""
        sequences: list[list[int]] = []
        for word in params.bad_words:
            for text in dict.fromkeys((word, " " + word.lstrip())):
                tokens = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[union-attr]
                if len(tokens) > MAX_BAD_WORD_TOKENS:
                    raise InvalidRequestError(
                        f"bad word {word!r} is {len(tokens)} tokens long; at most "
                        f"{MAX_BAD_WORD_TOKENS} are watched for."
                    )
                if tokens:
                    sequences.append(tokens)
        return sequences[:MAX_BAD_SEQUENCES]
