"""Requests as the authors' artefact makes them: lengths of a data set, Poisson arrivals (PAPER: section 6.1).

A trace is a CSV (or CSV.gz) with the columns prompt_tokens and output_tokens. Arrival times in it are not used: neither
ShareGPT nor Alpaca has any, so that the paper draws them at a chosen rate.
"""

import csv
import dataclasses
import functools
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FILES = {
    "sharegpt": "sharegpt_paper.csv.gz",
    "alpaca": "alpaca_first5k.csv.gz",
    "translation": "translate_en_de_proxy.csv.gz",
}
QUANTUM_S = 0.01
"""Arrivals are Poisson counts in quanta of so many seconds."""
MEANS = {"alpaca": (19.31, 58.45)}
"""Mean prompt and output tokens that figure 11 prints, where the trace is a sample with other means: the first 5,000
Alpaca items have 18.78 and 53.98. Their lengths are stretched to these."""
MAX_LEN = 2048
"""Context of OPT; longer pairs are left out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    arrival: float
    """Seconds."""
    prompt: int
    """Tokens."""
    output: int
    """Tokens, forced: nothing else ends a sequence."""


@functools.cache
def read_lengths(path: Path, max_len: int = MAX_LEN) -> np.ndarray:
    """int64 [requests, 2]: prompt and output tokens of the pairs that are shorter than `max_len` together."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        pairs = np.array([(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)])
    pairs = pairs[(pairs.sum(axis=1) < max_len) & (pairs > 0).all(axis=1)]
    if not len(pairs):
        raise ValueError(f"{path} has no request shorter than {max_len} tokens")
    return pairs


def load(folder: Path, data_set: str) -> np.ndarray:
    """The pairs of a data set, stretched to the paper's means where they are known: int64 [requests, 2]."""
    pairs = read_lengths(folder / FILES[data_set])
    if data_set not in MEANS:
        return pairs
    return np.maximum(1, np.rint(pairs * (np.array(MEANS[data_set]) / pairs.mean(axis=0)))).astype(int)


def poisson_arrivals(rate: float, duration: float, rng: np.random.Generator) -> np.ndarray:
    """Arrival times in seconds, ascending."""
    counts = rng.poisson(rate * QUANTUM_S, int(duration / QUANTUM_S))
    return np.repeat(np.arange(len(counts)), counts) * QUANTUM_S


def requests(pairs: np.ndarray, rate: float, duration: float, seed: int = 0) -> Iterator[Request]:
    """The first pairs, as many as there are arrivals (repeated if they are too few), in random order."""
    rng = np.random.default_rng(seed)
    arrivals = poisson_arrivals(rate, duration, rng)
    chosen = np.resize(pairs, (len(arrivals), 2))
    rng.shuffle(chosen)
    return (Request(t, p, o) for t, (p, o) in zip(arrivals.tolist(), chosen.tolist(), strict=True))


def chat_pairs(pairs: np.ndarray, count: int, seed: int = 0, *, rounds: float = 3.5, new: float = 0.1) -> np.ndarray:
    """Rounds of conversations: int64 [count, 2]. SYNTHETIC: the trace has first rounds alone.

    A conversation is a geometric number of rounds (mean `rounds`) with the lengths of consecutive pairs. A request
    begins a conversation with probability `new`, otherwise it is the next round of a random one that has begun
    (the artefact's rule for Orca). Its prompt is the last half context of all that was said, its output at most half a
    context less 8.
    """
    rng = np.random.default_rng(seed)
    half, source, result = MAX_LEN // 2, 0, []
    begun: list[list[int]] = []  # [rounds left, history tokens]
    while len(result) < count:
        if not begun or rng.random() < new:
            begun.append([int(rng.geometric(1 / rounds)), 0])
            which = len(begun) - 1
        else:
            which = int(rng.integers(len(begun)))
        talk = begun[which]
        query, answer = pairs[source % len(pairs)].tolist()
        source += 1
        result.append((min(talk[1] + query, half), min(answer, half - 8)))
        talk[1] += query + answer
        talk[0] -= 1
        if not talk[0]:
            begun[which] = begun[-1]
            begun.pop()
    return np.array(result)
