"""What a server is asked in a benchmark, and when: prompts of a data set, and a process of arrivals."""

import csv
import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpaged.errors import InvalidConfigError

MAX_ROWS = 1_000_000
_FIRST_TOKEN, _NUM_TOKENS = 3, 250
"""Random prompts are of these token ids, which every vocabulary has."""
_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they"),
    *("at", "be", "this", "from", "have", "or", "by", "one", "had", "not"),
)
"""Random text is of these words, each of which is one token for most tokenizers."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request of a workload."""

    prompt: str | list[int]
    output_len: int
    arrival: float | None = None
    """Seconds after the first, in a trace."""


class TraceRow(NamedTuple):
    """A request of the past."""

    arrival: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, most: int) -> list[TraceRow]:
    """The first rows of a trace: .csv or .csv.gz with columns arrival_s, prompt_tokens and output_tokens.

    Raises:
      InvalidConfigError: the file can't be read, or is no such trace.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = [
                TraceRow(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
                for row in itertools.islice(csv.DictReader(file), min(most, MAX_ROWS))
            ]
    except OSError as error:
        raise InvalidConfigError(f"--dataset-path {path}: {error.strerror or error}.") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidConfigError(
            f"--dataset-path {path}: a CSV file with columns arrival_s, prompt_tokens "
            f"and output_tokens is expected ({error})."
        ) from error
    arrivals = [row.arrival for row in rows]
    if not rows or any(row.prompt_tokens < 1 or row.output_tokens < 1 for row in rows):
        raise InvalidConfigError(f"--dataset-path {path}: it has no rows, or lengths below 1.")
    if not all(map(math.isfinite, arrivals)) or arrivals != sorted(arrivals):
        raise InvalidConfigError(f"--dataset-path {path}: arrival_s must be finite and never decrease.")
    return rows


def read_prompts(path: Path, most: int, output_len: int) -> list[Ask]:
    """The first lines of a .jsonl file: {"prompt": text or token ids, "output_tokens": (or output_len)}.

    Raises:
      InvalidConfigError: the file can't be read, or has other lines.
    """
    asks = []
    try:
        with path.open() as file:
            for line in itertools.islice(file, min(most, MAX_ROWS)):
                row = json.loads(line)
                asks.append(Ask(row["prompt"], int(row.get("output_tokens", output_len))))
    except OSError as error:
        raise InvalidConfigError(f"--dataset-path {path}: {error.strerror or error}.") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        message = (
            f'--dataset-path {path}: lines with {{"prompt": ...}} are expected ({error!r} in line {len(asks) + 1}).'
        )
        raise InvalidConfigError(message) from error
    if not asks:
        raise InvalidConfigError(f"--dataset-path {path}: it has no lines.")
    return asks


def of_lengths(rows: list[TraceRow], *, text: bool, random: np.random.Generator) -> list[Ask]:
    """Random prompts with the lengths and arrivals of a trace."""
    begin = rows[0].arrival
    return [Ask(random_prompt(p, text, random), output, arrival - begin) for arrival, p, output in rows]


def random_asks(
    count: int, input_len: int, output_len: int, range_ratio: float, *, text: bool, random: np.random.Generator
) -> list[Ask]:
    """Random prompts; lengths are uniform within `range_ratio` around the wanted ones."""
    inputs, outputs = (_around(length, range_ratio, count, random) for length in (input_len, output_len))
    return [Ask(random_prompt(i, text, random), o) for i, o in zip(inputs, outputs, strict=True)]


def repeated_prefixes(
    count: int,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    *,
    text: bool,
    random: np.random.Generator,
) -> list[Ask]:
    """Prompts that share `num_prefixes` beginnings in turn, in random order."""
    prefixes = [random_prompt(prefix_len, text, random) for _ in range(num_prefixes)]
    suffixes = [random_prompt(suffix_len, text, random) for _ in range(count)]
    which = random.permutation(np.arange(count) % num_prefixes)
    return [Ask(_join(prefixes[i], suffix), output_len) for i, suffix in zip(which, suffixes, strict=True)]


def random_prompt(length: int, text: bool, random: np.random.Generator) -> str | list[int]:
    """So many random token ids, or so many random words."""
    if text:
        return " ".join(random.choice(_WORDS, length).tolist())
    return random.integers(_FIRST_TOKEN, _FIRST_TOKEN + _NUM_TOKENS, length).tolist()


def arrivals_of(asks: list[Ask], rate: float, burstiness: float, random: np.random.Generator) -> list[float]:
    """When each request is sent, in seconds after the start.

    A trace keeps its own pattern; a finite rate stretches it to that mean rate. Others come at the rate, in intervals
    of a gamma distribution with shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is more even.
    """
    if asks[0].arrival is not None:
        own: list[float] = [ask.arrival for ask in asks]  # type: ignore[misc]  # all have one, or none
        factor = 1.0 if math.isinf(rate) or not own[-1] else (len(own) - 1) / (own[-1] * rate)
        return [factor * arrival for arrival in own]
    if math.isinf(rate):
        return [0.0] * len(asks)
    return np.cumsum(random.gamma(burstiness, 1 / (rate * burstiness), len(asks))).tolist()


def _around(length: int, ratio: float, count: int, random: np.random.Generator) -> list[int]:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    return random.integers(low, high + 1, count).tolist()


def _join(prefix: Any, suffix: Any) -> str | list[int]:
    return f"{prefix} {suffix}" if isinstance(prefix, str) else prefix + suffix
