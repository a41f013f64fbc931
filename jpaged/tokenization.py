"""Text to tokens and back: prompts and chats at the edge, incremental detokenisation, stop strings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from jpaged.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase


class TokensPrompt(TypedDict, total=False):
    """A prompt as tokens, or as text with more than text."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


Chat = list[dict[str, Any]]
"""Messages: [{"role": "user", "content": "..."}, ...]."""

Prompt = str | TokensPrompt | Chat


def is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def encode_prompt(prompt: Prompt, tokenizer: "Tokenizer | None") -> tuple[str | None, list[int], str]:
    """(text or None, token ids, cache salt) of a prompt in any of its forms.

    Raises:
      InvalidRequestError: it has none of the forms, or text comes to an engine without a tokenizer.
    """
    if isinstance(prompt, str):
        return prompt, _encode(prompt, tokenizer), ""
    if is_chat(prompt):
        rendered = render_chat(prompt, tokenizer)  # type: ignore[arg-type]
        return rendered, _encode(rendered, tokenizer, add_special_tokens=False), ""
    if isinstance(prompt, Mapping) and ("prompt_token_ids" in prompt or "prompt" in prompt):
        salt = prompt.get("cache_salt") or ""
        if not isinstance(salt, str) or len(salt) > 1024:
            raise InvalidRequestError("cache_salt must be a string of at most 1024 characters.")
        text = prompt.get("prompt")
        if "prompt_token_ids" in prompt:
            return text, list(prompt["prompt_token_ids"]), salt
        if isinstance(text, str):
            return text, _encode(text, tokenizer), salt
    raise InvalidRequestError(
        'a prompt is a string, a chat (a list of {"role": ..., "content": ...}), {"prompt": "..."} or '
        f'{{"prompt_token_ids": [...]}}, not {type(prompt).__name__}.')


def render_chat(messages: Chat, tokenizer: "Tokenizer | None", *, add_generation_prompt: bool = True,
                continue_final_message: bool = False) -> str:
    """The text of a chat by the model's own template.

    Raises:
      InvalidRequestError: there is no template, or it does not take these messages.
    """
    tokenizer = _require(tokenizer)
    if not tokenizer.chat_template:
        raise InvalidRequestError("this model's tokenizer has no chat template: pass plain text to generate() instead.")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InvalidRequestError("every chat message needs a string 'role' and a string 'content'.")
    import jinja2  # what transformers renders templates with, sandboxed

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                 continue_final_message=continue_final_message))
    except (jinja2.TemplateError, ValueError) as error:
        raise InvalidRequestError(f"the chat template does not take these messages: {error}") from error


def _require(tokenizer: "Tokenizer | None") -> "Tokenizer":
    if tokenizer is None:
        raise InvalidRequestError('this engine has no tokenizer: pass {"prompt_token_ids": [...]}.')
    return tokenizer


def _encode(text: str, tokenizer: "Tokenizer | None", *, add_special_tokens: bool = True) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates can't be written as UTF-8
        raise InvalidRequestError(f"the prompt is not valid Unicode: {error.reason}.") from error
    return _require(tokenizer).backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    A token may end in the middle of a character, or change how the one before it is written, so text is given
    out only once it is final; `finish` gives the rest.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        # A few tokens of context tell whether a leading space belongs to the first word.
        self._stream = DecodeStream(ids=prompt_token_ids[-6:], skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        self.text = ""

    def push(self, tokens: list[int]) -> str:
        """Adds tokens; returns the text that became final."""
        before = len(self.text)
        for token in tokens:
            piece = self._stream.step(self._backend, token)
            self._pending = self._pending[-16:] if piece is None else []
            if piece is None:
                self._pending.append(token)
            else:
                self.text += piece
        return self.text[before:]

    def finish(self) -> None:
        """No more tokens come: an unfinished character becomes a replacement character."""
        if self._pending:
            self.text += self._backend.decode(self._pending, skip_special_tokens=self._skip)
            self._pending = []


def find_stop(text: str, new: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """The first stop string that ends within the last `new` characters of text: (where it begins, which).

    A stop string may lie across tokens or inside one, so the search goes back as far as the longest could reach.
    """
    best: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(0, len(text) - new - len(stop) + 1))
        if at >= 0 and (best is None or at < best[0]):
            best = (at, stop)
    return best


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters of text may turn out to begin a stop string, and so are not shown yet."""
    most = max((len(s) for s in stops), default=0) - 1
    for count in range(min(most, len(text)), 0, -1):
        if any(s.startswith(text[-count:]) for s in stops):
            return count
    return 0
