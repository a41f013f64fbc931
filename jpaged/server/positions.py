"""Positions: how much of an answer a client has, so that a stream goes on where the one before it was cut off.

Each event of a stream that can be taken up again has an id. It says what the client has once it has the event:

    0:12.57,1:9.40e        choice:tokens.characters, of each choice that has begun; e: its tool calls, too

A client that comes back sends the last id that it has seen (`Last-Event-ID`, as browsers do), or says how many
characters of a single choice it has.
"""

import dataclasses
import re

from jpaged.outputs import CompletionOutput, changed
from jpaged.server.errors import ApiError

MAX_CHOICES = 64
"""Events of larger answers have no ids: they would be longer than what they name."""
_MAX_TEXT = 4096
_ONE = re.compile(r"(\d{1,5}):(\d{1,9})\.(\d{1,9})(e?)")


@dataclasses.dataclass(slots=True)
class Position:
    """In one choice."""

    tokens: int = 0
    chars: int = 0
    """Unicode code points of what is sent: of a chat, the content; of a completion, what follows the prompt."""
    calls: bool = False


class Positions:
    """Follows a stream that is made again from its beginning, and leaves out what the client has.

    Args:
      have: of each choice.
      named: whether events have ids.
    """

    def __init__(self, have: dict[int, Position] | None = None, *, named: bool = False) -> None:
        self._have = have or {}
        self._at: dict[int, Position] = {}
        self._named = named

    @property
    def event_id(self) -> str | None:
        """Of an event after which the client has all up to here."""
        if not self._named or len(self._at) > MAX_CHOICES:
            return None
        furthest = {index: self._furthest(index) for index in self._at}
        return ",".join(f"{i}:{p.tokens}.{p.chars}{'e' * p.calls}" for i, p in furthest.items()) or None

    def _furthest(self, index: int) -> Position:
        at, have = self._at[index], self._have.get(index, Position())
        return Position(max(at.tokens, have.tokens), max(at.chars, have.chars), at.calls or have.calls)

    def new(self, index: int, completion: CompletionOutput, text: str) -> CompletionOutput:
        """What the client does not have of a choice's next tokens and text."""
        at, have = self._at.setdefault(index, Position()), self._have.get(index, Position())
        skipped = max(0, have.tokens - at.tokens), max(0, have.chars - at.chars)
        at.tokens += len(completion.token_ids)
        at.chars += len(text)
        return (completion if completion.text is text else changed(completion, text=text)).after(*skipped)

    def take_calls(self, index: int) -> bool:
        """A choice's tool calls are sent. Returns False if the client has them."""
        self._at.setdefault(index, Position()).calls = True
        return not self._have.get(index, Position()).calls


def parse(last_event_id: str | None, from_char: int | None) -> dict[int, Position]:
    """What a client says that it has.

    Raises:
      ApiError: 400, it says nothing that one of our events could have told it.
    """
    if last_event_id:
        matches = [_ONE.fullmatch(one) for one in last_event_id[:_MAX_TEXT].split(",")]
        if None in matches or len(last_event_id) > _MAX_TEXT:
            raise ApiError(400, "Last-Event-ID is not the id of an event of this server.", param="Last-Event-ID")
        found = [match.groups() for match in matches if match is not None]
        return {int(i): Position(int(tokens), int(chars), bool(calls)) for i, tokens, chars, calls in found}
    return {0: Position(chars=from_char)} if from_char else {}
