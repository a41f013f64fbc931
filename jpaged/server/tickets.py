"""Ticket: under which name a client's request runs, and whose it is."""

import dataclasses
from typing import Literal

Kind = Literal["cmpl", "chatcmpl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ticket:
    """What an answer says about its request; the same when it is given again after a restart."""

    id: str
    """As in the answer."""
    kind: Kind
    model: str
    """The name that the client knows it by."""
    created: int
    """In seconds since the epoch."""
    owner: str = ""
    """A digest of the API key that it came with; "": there are no keys."""
    named: bool = False
    """By the client, who can ask for it again."""
