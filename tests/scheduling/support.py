"""Hand-made loads for hand-made engines."""

from tests.scheduling.null_engine import NullEngine


def engine(**changes) -> NullEngine:
    sizes = {
        "num_blocks": 40,
        "block_size": 4,
        "rows": 4,
        "max_len": 64,
        "tile_size": 4,
        "budget": 20,
        "watermark": 0.0,
    }
    return NullEngine(**(sizes | changes))


def prompt(length, first=0):
    return [(first + i) % 7 + 10 for i in range(length)]
