"""Every error that jpaged raises on purpose. Each message says what was wrong and what to do.

Errors about files on disk are `checkpoints.CheckpointError` and its kinds.
"""


class JpagedError(Exception):
    """The root of all errors raised by jpaged's engine."""


class InvalidConfigError(JpagedError, ValueError):
    """An engine argument is out of range, or two of them contradict each other."""


class InvalidRequestError(JpagedError, ValueError):
    """A request can't be served as asked: a 400-class error, running requests are untouched."""


class UnsupportedFeatureError(JpagedError, NotImplementedError):
    """A name that users of other engines know, and that jpaged does not offer (yet)."""


class OutOfMemoryError(JpagedError, MemoryError):
    """The memory budget leaves no room for a useful KV pool."""


class QueueFullError(JpagedError, RuntimeError):
    """Too much is waiting already: the same request may be taken later."""


class EngineDeadError(JpagedError, RuntimeError):
    """A device step failed; the engine's state is lost and it takes no more requests."""


class SnapshotError(JpagedError, RuntimeError):
    """A snapshot can't be written, is damaged, or belongs to another model or to an engine that can't go on with it."""
