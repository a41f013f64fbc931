"""Guesses at a sequence's next tokens from those that it has (prompt lookup decoding)."""

from jpaged.sequence import Sequence

MOST_SKIPPED = 32
"""Tokens that a sequence whose guesses were all wrong is left alone for, at most."""


class Ngrams:
    """Where each run of some tokens was last seen in one sequence, and how well it has foretold the next ones."""

    __slots__ = ("_indexed", "_last", "misses", "skip", "trust")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self.trust = 2
        """Guesses that are worth a lane: twice as many as were right the last time, if all were."""
        self.misses = self.skip = 0

    def learn(self, guessed: int, accepted: int) -> None:
        self.trust = 2 * accepted if accepted == guessed else max(accepted, 1)
        self.misses = 0 if accepted else self.misses + 1
        self.skip = min(2**self.misses - 2, MOST_SKIPPED) if self.misses else 0

    def continuation(self, tokens: list[int], sizes: range, count: int) -> list[int]:
        """The `count` tokens that followed where the longest run of last tokens stood before; [] if none did."""
        for end in range(self._indexed, len(tokens)):  # runs that end before `end`: something follows them
            for size in sizes:
                if size <= end:
                    self._last[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size in reversed(sizes):
            start = self._last.get(tuple(tokens[-size:]))
            if start is not None:
                guessed: list[int] = []
                for i in range(start, start + count):  # a loop goes on into what is guessed
                    guessed.append(tokens[i] if i < len(tokens) else guessed[i - len(tokens)])
                return guessed
        return []


class NgramSpeculator:
    """Guesses that a sequence goes on as it did where its last tokens stood before.

    As lanes cost time, a sequence gets as many as its last guesses were worth; one whose guesses were all wrong is left
    alone for a while, twice as long each time.

    Args:
      num_tokens: guesses at a time, at most.
      longest, shortest: numbers of last tokens that are looked for.

    Attributes:
      num_guessed, num_accepted: tokens, ever.
    """

    def __init__(self, num_tokens: int, longest: int, shortest: int) -> None:
        self.num_tokens = num_tokens
        self._sizes = range(shortest, longest + 1)
        self.num_guessed = self.num_accepted = 0

    def guess(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` guesses at a sequence's next tokens. All that it has drawn must be known.

        What decides about a token besides the draw, on the host and one at a time, can't be had for several at once:
        beams, grammars and stop strings. Captured activations are of computed tokens, which guesses may not be.
        """
        group = sequence.group
        params = group.params
        if group.beams or params.structured_outputs or params.stop or group.bypasses_cache:
            return []
        if sequence.ngrams is None:
            sequence.ngrams = Ngrams()
        ngrams = sequence.ngrams
        if ngrams.skip:
            ngrams.skip -= 1
            return []
        return ngrams.continuation(sequence.tokens, self._sizes, min(most, self.num_tokens, ngrams.trust))

    def learn(self, sequence: Sequence, guessed: int, accepted: int) -> None:
        """Counts a step's guesses at a sequence's tokens."""
        self.num_guessed += guessed
        self.num_accepted += accepted
        if sequence.ngrams is not None:
            sequence.ngrams.learn(guessed, accepted)
