"""Values of an untrusted configuration: typed, finite, bounded, or an error that says what to change."""

import math
from collections.abc import Mapping
from typing import Any

# Far above every published model, far below what would exhaust memory before anybody notices a corrupt number.
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 23
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_EXPERTS = 1 << 12
MAX_EXPERTS_IN_ALL = 1 << 18  # of all layers: files hold a tensor for each
MAX_POSITIONS = 1 << 30


class ModelConfigError(ValueError):
    """A configuration value is missing, of the wrong type, not finite, or out of range."""


class UnsupportedModelError(ModelConfigError):
    """The configuration is well formed, but describes something that jpaged does not implement."""


def token_ids(value: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    """`None`, one token id or a list of them, as a tuple without repetitions; `name` is for messages.

    Raises:
        ModelConfigError: not integers, more than 1024 of them, or outside [0, vocab_size).
    """
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if len(values) > 1024:
        raise ModelConfigError(f"{name} lists {len(values)} tokens; at most 1024 are sensible")
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ModelConfigError(f"{name} must be an integer or a list of integers, got {token!r}")
        if not 0 <= token < vocab_size:
            raise ModelConfigError(f"{name} = {token} lies outside the vocabulary [0, {vocab_size})")
    return tuple(dict.fromkeys(values))


class Reader:
    """Typed, bounded look-ups in an untrusted mapping. `where` names the mapping in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self._where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, unchecked; `default` if absent."""
        return self.values.get(key, default)

    def size(self, key: str, *, maximum: int, default: int | None = None) -> int:
        """An integer in [1, maximum]; `default` stands for an absent or null value."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelConfigError(f"{self._where} has no {key!r}, which is required")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelConfigError(f"{self._where}[{key!r}] must be an integer, got {value!r}")
        if not 1 <= value <= maximum:
            raise ModelConfigError(f"{self._where}[{key!r}] = {value} must lie in [1, {maximum}]")
        return value

    def count(self, key: str, *, maximum: int, default: int) -> int:
        """Like `size`, but 0 is allowed."""
        value = self.values.get(key)
        value = default if value is None else value
        return 0 if type(value) is int and value == 0 else self.size(key, maximum=maximum, default=default)

    def optional_size(self, key: str, *, maximum: int) -> int | None:
        """Like `size`, but null stays None."""
        return None if self.values.get(key) is None else self.size(key, maximum=maximum)

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high], where a low of 0 is itself excluded."""
        value = self.values.get(key)
        return _bounded(default if value is None else value, f"{self._where}[{key!r}]", low, high)

    def optional_number(self, key: str, *, low: float, high: float) -> float | None:
        """Like `number`, but null stays None, and so does 0 (older DeepSeek configurations mean "unset" by
        it)."""
        return self.number(key, low=low, high=high) if self.values.get(key) else None

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive numbers."""
        value = self.values.get(key)
        if not isinstance(value, list | tuple) or len(value) != length:
            found = f"{len(value)} values" if isinstance(value, list | tuple) else repr(value)
            raise ModelConfigError(f"{self._where}[{key!r}] must be a list of {length} numbers, got {found}")
        return tuple(_bounded(item, f"{self._where}[{key!r}][{i}]", 0.0, 1e6) for i, item in enumerate(value))

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> tuple[str, ...]:
        """A list of exactly `length` of the `allowed` strings; null is the empty tuple.

        Raises:
            UnsupportedModelError: another string.
        """
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ModelConfigError(f"{self._where}[{key!r}] must be a list of {length} strings, got {value!r:.200}")
        for item in value:
            if item not in allowed:
                raise UnsupportedModelError(
                    f"{self._where}[{key!r}] holds {item!r}, which is not supported; supported: {', '.join(allowed)}"
                )
        return tuple(value)

    def refuse(self, key: str, harmless: Any) -> None:
        """Raises `UnsupportedModelError` unless the value is absent, null or `harmless`."""
        value = self.values.get(key)
        if value is not None and value != harmless:
            raise UnsupportedModelError(f"{self._where}[{key!r}] = {value!r} is not supported; only {harmless!r} is")

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; an absent or null value is the default."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelConfigError(f"{self._where}[{key!r}] must be true or false, got {value!r}")
        return default if value is None else value


def _bounded(value: Any, where: str, low: float, high: float) -> float:
    if value is None:
        raise ModelConfigError(f"{where} is required")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelConfigError(f"{where} must be a number, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelConfigError(f"{where} must be finite, got {value!r}")
    if not (low < value <= high or value == low > 0):
        raise ModelConfigError(f"{where} = {value} must lie in {'[' if low else '('}{low}, {high}]")
    return float(value)
