"""Text to tokens and back: prompts and chats at the edge, incremental detokenisation, stop strings."""

import copy
from collections.abc import Iterable, Mapping
from numbers import Integral
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
        return prompt, encode_text(prompt, tokenizer), ""
    if is_chat(prompt):
        rendered = render_chat(prompt, tokenizer)  # type: ignore[arg-type]
        return rendered, encode_text(rendered, tokenizer, add_special_tokens=False), ""
    if isinstance(prompt, Mapping) and ("prompt_token_ids" in prompt or "prompt" in prompt):
        salt, text = prompt.get("cache_salt") or "", prompt.get("prompt")
        if not isinstance(salt, str) or len(salt) > 1024:
            raise InvalidRequestError("cache_salt must be a string of at most 1024 characters.")
        _check_unicode("cache_salt", salt)
        if "prompt_token_ids" in prompt and (text is None or isinstance(text, str)):
            return text, _token_list(prompt["prompt_token_ids"]), salt
        if isinstance(text, str):
            return text, encode_text(text, tokenizer), salt
    raise InvalidRequestError(
        'a prompt is a string, a chat (a list of {"role": ..., "content": ...}), {"prompt": "..."} or '
        f'{{"prompt_token_ids": [...]}}, not {type(prompt).__name__}.'
    )


def render_chat(
    messages: Chat,
    tokenizer: "Tokenizer | None",
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a chat by the model's own template.

    Args:
      messages: a message without a content must have tool_calls.
      tools: functions that the model may call, as OpenAI's API has them.
      variables: more that the template reads, such as enable_thinking.

    Raises:
      InvalidRequestError: there is no template, or it does not take these messages.
    """
    tokenizer = _require(tokenizer)
    if not tokenizer.chat_template:
        raise InvalidRequestError("this model's tokenizer has no chat template: pass plain text to generate() instead.")
    for message in messages:
        silent = message.get("content") is None and message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not (silent or isinstance(message.get("content"), str)):
            raise InvalidRequestError("every chat message needs a string 'role' and a string 'content'.")
    import jinja2  # what transformers renders templates with, sandboxed

    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,  # type: ignore[arg-type]  # a list is invariant
                **(variables or {}),
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"the chat template does not take these messages: {error}") from error


def _require(tokenizer: "Tokenizer | None") -> "Tokenizer":
    if tokenizer is None:
        raise InvalidRequestError('this engine has no tokenizer: pass {"prompt_token_ids": [...]}.')
    return tokenizer


def encode_text(text: str, tokenizer: "Tokenizer | None", *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text.

    Raises:
      InvalidRequestError: there is no tokenizer, or the text is not valid Unicode.
    """
    _check_unicode("the prompt", text)
    return _require(tokenizer).backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _token_list(tokens: Any) -> list[int]:
    """Token ids as Python numbers; the engine checks each."""
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise InvalidRequestError(f"prompt_token_ids must be a list of token ids, not {type(tokens).__name__}.")
    return [int(t) if isinstance(t, Integral) and not isinstance(t, bool) else t for t in tokens]


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates can't be written as UTF-8
        raise InvalidRequestError(f"{what} is not valid Unicode: {error.reason}.") from error


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    A token may end in the middle of a character, or change how the one before it is written, so text is given
    out only once it is final; `finish` gives the rest.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._begin(self._context(prompt_token_ids))
        self._pending: list[int] = []  # tokens since the last text
        self.text = ""

    def fork(self) -> "Detokenizer":
        """Another one at the same place."""
        twin = copy.copy(self)
        twin._pending, twin._fed = list(self._pending), list(self._fed)
        try:
            twin._stream = copy.copy(self._stream)
        except TypeError:  # tokenizers before 0.23 can't copy one: the twin's is given what this one has seen
            twin._begin(self._begun_with)
            for token in self._fed:
                twin._step(token)
        return twin

    def push(self, tokens: list[int]) -> str:
        """Adds tokens; returns the text that became final."""
        before = len(self.text)
        for token in tokens:
            self._pending.append(token)
            piece = self._decode_next(token)
            if piece is not None:
                self.text += piece
                self._pending = []
        return self.text[before:]

    def _decode_next(self, token: int) -> str | None:
        """The text that became final, or None if it may still change."""
        try:
            return self._step(token)
        except Exception:  # tokenizers raises nothing more precise
            # Byte-fallback decoders (SentencePiece) take back a character if the bytes after it are no UTF-8. What
            # has been given out stays; what was pending is decoded for itself, and a new stream begins.
            self._begin([token])
            return self._backend.decode(self._pending, skip_special_tokens=self._skip)

    def _context(self, prompt: list[int]) -> list[int]:
        """The prompt's last tokens, which tell whether a leading space belongs to the first word.

        They must not begin or end inside a character, or what is wrong with it would be given out as text.
        """
        for count in range(6, 25):
            context = prompt[-count:]
            if "\ufffd" not in self._backend.decode(context, skip_special_tokens=self._skip):
                return context
        return []

    def _begin(self, context: list[int]) -> None:
        """A new stream, after some tokens whose text is given out already."""
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        self._begun_with, self._fed = context, list[int]()

    def _step(self, token: int) -> str | None:
        self._fed.append(token)
        return self._stream.step(self._backend, token)

    def finish(self) -> None:
        """No more tokens come: an unfinished character becomes a replacement character."""
        if self._pending:
            self.text += self._backend.decode(self._pending, skip_special_tokens=self._skip)
            self._pending = []


def find_stop(text: str, new: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """The first stop string that ends within the last `new` characters of text: (where it begins, which).

    First is what ends first, and of those the longest: that does not depend on how the text was cut into pieces.
    A stop string may lie across tokens or inside one, so the search goes back as far as the longest could reach.
    """
    found = []
    for stop in stops:
        at = text.find(stop, max(0, len(text) - new - len(stop) + 1))
        if at >= 0:
            found.append((at + len(stop), at, stop))
    return min(found)[1:] if found else None


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters of text may turn out to begin a stop string, and so are not shown yet."""
    most = max((len(s) for s in stops), default=0) - 1
    for count in range(min(most, len(text)), 0, -1):
        if any(s.startswith(text[-count:]) for s in stops):
            return count
    return 0
