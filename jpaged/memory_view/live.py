"""The pool while it runs, for readers who come when they like: the frames of a recording, of which the latest are kept.

Tokens are counted and never told: whoever may see how a server does need not see what its users wrote.
"""

import collections
import dataclasses
import uuid
from typing import Any

from jpaged.memory_view.delta import Frame, difference, empty
from jpaged.memory_view.snapshot import Observable, PoolShape, Snapshot, live_groups, measure, snapshot

KEPT = 64
"""Frames that a reader may have missed. One who has missed more is sent everything anew."""


def look(engine: Observable) -> Snapshot:
    """What a feed takes; call it between two steps."""
    return snapshot(engine, live_groups(engine), with_tokens=False)


class Feed:
    """Snapshots as a stream that every reader takes in pieces of its own. Not thread-safe."""

    def __init__(self, pool: PoolShape) -> None:
        self._name = uuid.uuid4().hex[:8]  # a reader's cursor may be of another server
        self._latest = empty(pool)
        self._frames: collections.deque[Frame] = collections.deque(maxlen=KEPT)
        self._count = 0

    def push(self, latest: Snapshot) -> None:
        """Takes what comes after all that was taken before."""
        self._frames.append(difference(self._latest, latest))
        self._latest = latest
        self._count += 1

    def since(self, cursor: str) -> dict[str, Any]:
        """What a reader needs, as plain JSON. page/live.js reads it, and `jpaged top`.

        Args:
          cursor: what the last answer said. Anything else counts as a reader that knows nothing.

        Returns: `frames` (see delta.py), to be applied to what the reader has, or to nothing if `reset`; the shape of
        the `pool`; `measures`; and the next `cursor`.
        """
        name, _, count = cursor.partition("-")
        missed = self._count - int(count) if count.isdecimal() and len(count) < 20 and name == self._name else -1
        known = 0 <= missed <= len(self._frames)
        latest = self._latest
        return {
            "cursor": f"{self._name}-{self._count}",
            "reset": not known,
            "frames": list(self._frames)[len(self._frames) - missed :]
            if known
            else [difference(empty(latest.pool), latest)],
            "pool": latest.pool._asdict(),
            "measures": dataclasses.asdict(measure(latest)),
        }
