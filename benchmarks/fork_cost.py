"""What does a fork cost, and how much of that grows with the sequence? The engine's own code, without a model.

    python -m benchmarks.fork_cost [--tokens 128 32768] [--forks 100] [--rounds 25] [--json OUT]

    beam       a hypothesis goes on in two ways: a node with a parent pointer, and a row over the blocks of another
    sample     n > 1: a row over the blocks of the one that computed the prompt, and a list of its tokens
    session    `Session.fork`: a parked table over the same blocks, and a list of its tokens

Host time of one fork, without its release: the median over rounds of a mean over forks. The lengths take turns within
a round, so that their ratio does not feel the machine's drift. Prefix caching is on: a fork takes the chain of its
blocks' digests along. The copies that forks have cost until then are counted: none.
"""

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jpaged.memory import BlockManager
from jpaged.scheduling.beam_search import Node
from jpaged.sequence import Holder
from jpaged.session import Session

BLOCK_SIZE = 16


class Forks:
    """One sequence of `length` tokens, computed, and what may be forked from it.

    Args:
      length: tokens.
      most: rows that it may be forked into.
    """

    def __init__(self, length: int, most: int) -> None:
        self.tokens, self.most = list(range(length)), most
        width = -(-length // BLOCK_SIZE)
        self.blocks = blocks = BlockManager(2 * width + 2, BLOCK_SIZE, most + 2, width)
        self.node = functools.reduce(Node, self.tokens, None)
        for row in (0, 1):
            blocks.try_open([row], [self.tokens], salt=f"{row}")
            blocks.seal(row, self.tokens, length)
        llm = SimpleNamespace(engine=SimpleNamespace(blocks=blocks))
        self.session = Session(llm, self.tokens, holder=Holder(blocks.parked.park(1, length)))  # type: ignore[arg-type]

    def beam(self, row: int) -> Callable[[], None]:
        self.blocks.fork(0, row)
        self.kept = Node(self.node, row)
        return functools.partial(self.blocks.close, row)

    def sample(self, row: int) -> Callable[[], None]:
        self.blocks.fork(0, row)
        self.kept = list(self.tokens)
        return functools.partial(self.blocks.close, row)

    def branch(self, row: int) -> Callable[[], None]:
        [session] = self.session.fork()
        return session.close

    def time(self, fork: Callable[[int], Callable[[], None]]) -> float:
        """Microseconds of one fork."""
        start = time.perf_counter()
        releases = [fork(row) for row in range(2, self.most + 2)]
        elapsed = time.perf_counter() - start
        for release in releases:
            release()
        return elapsed / self.most * 1e6


def measure(lengths: list[int], forks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each kind: microseconds at each length, and the last over the first."""
    sequences = [Forks(length, forks) for length in lengths]
    samples: dict[str, list[list[float]]] = {"beam": [], "sample": [], "session": []}
    gc.disable()
    for _ in range(rounds):
        samples["beam"].append([s.time(s.beam) for s in sequences])
        samples["sample"].append([s.time(s.sample) for s in sequences])
        samples["session"].append([s.time(s.branch) for s in sequences])
    gc.enable()
    results = {}
    for kind, times in samples.items():
        medians = np.median(times, axis=0)
        columns = {f"us_at_{length}": float(us) for length, us in zip(lengths, medians, strict=True)}
        results[kind] = columns | {"ratio": float(medians[-1] / medians[0])}
    for sequence in sequences:
        sequence.blocks.check_invariants()
        if sequence.blocks.num_copies:
            raise RuntimeError("a fork has copied a block")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 32_768])
    parser.add_argument("--forks", type=int, default=100, help="forks that are timed together")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = measure(arguments.tokens, arguments.forks, arguments.rounds)
    columns = list(results["beam"])
    print(" ".join(f"{c:>14}" for c in ["fork", *columns]))
    for kind, row in results.items():
        print(" ".join([f"{kind:>14}", *(f"{row[c]:>14.2f}" for c in columns)]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "fork_cost", "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
