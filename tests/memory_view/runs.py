"""Random runs of the null engine: all that can happen to a block happens in a pool that is too small."""

import random
from collections.abc import Iterator

from tests.scheduling.null_engine import NullEngine


def small_engine(caching: bool = True, windows: tuple[int | None, ...] = (None,)) -> NullEngine:
    return NullEngine(
        num_blocks=24,
        block_size=4,
        rows=6,
        max_len=64,
        tile_size=4,
        budget=6 + 16,
        watermark=0.05,
        caching=caching,
        swap_blocks=16,
        windows=windows,
    )


def random_steps(engine: NullEngine, seed: int, steps: int = 100) -> Iterator[None]:
    """Requests come, with common prefixes, samples and beams; some are aborted; tables are parked. Yields after each step."""
    dice = random.Random(seed)
    prefix = [dice.randrange(4) for _ in range(12)]
    for _ in range(steps):
        if dice.random() < 0.5 and len(engine.unfinished) < 10:
            prompt = prefix[: dice.randrange(13)] + [dice.randrange(4) for _ in range(dice.randrange(1, 12))]
            n = dice.choice((1, 1, 2, 3))
            beams = n > 1 and dice.random() < 0.4
            engine.add(prompt, dice.randrange(1, 20), n=n, beams=beams, stop=dice.random() < 0.3)
        if dice.random() < 0.03 and engine.unfinished:
            engine.abort(dice.choice(engine.unfinished))
        if dice.random() < 0.05:
            park(engine, prefix)
        engine.step()
        yield


def park(engine: NullEngine, tokens: list[int]) -> None:
    """Leaves a table without a row, if there is a row to make it on; it goes when blocks are short."""
    free = [row for row, sequence in enumerate(engine.scheduler.batch.by_row) if sequence is None]
    if free and engine.blocks.try_open(free[:1], [tokens]) is not None:
        engine.blocks.parked.fork(engine.blocks.parked.park(free[0], len(tokens)))
