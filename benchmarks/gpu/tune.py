"""Looks for the fastest tiles of the Triton kernels on this GPU, and keeps them where the kernels find them.

    python -m benchmarks.gpu.tune [--output DIR]     writes pallas_kernels/tuned/KIND.json; also a part of run.sh

From the default on, one field is changed at a time, and a change that is faster is kept: about ten kernels are compiled
and timed for each operation and head size.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import BLOCK_SIZE, noise_pool, scattered_tables
from benchmarks.gpu.part import Recorder
from benchmarks.gpu.timing import seconds
from pallas_kernels.dispatch import current_device
from pallas_kernels.paged_attention import triton, tuned
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.tiles import Tiles

Time = Callable[[Tiles], float]

HEADS = {64: (32, 8), 128: (32, 8), 256: (8, 4)}  # query and KV heads, by head size
ROWS, CONTEXT, QUERIES = 64, 4096, 64
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"tokens": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (2, 4, 8), "programs": (264, 528, 1056)},
    "prefill": {"tokens": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3), "rows": (64, 128)},
}
BETTER = 0.98
"""A change must be faster by so much: timings scatter."""


def search(start: Tiles, choices: dict[str, tuple[int, ...]], time: Time) -> Tiles:
    """The fastest tiles that changes of one field at a time find, each to one of its choices.

    Args:
      time: seconds with these tiles. What raises is no choice (too much shared memory, say), unless it is the start.
    """
    best, least = start, time(start)
    for field, value in ((field, value) for field, values in choices.items() for value in values):
        tiles = dataclasses.replace(best, **{field: value})
        if tiles == best:
            continue
        try:
            taken = time(tiles)
        except Exception:  # whatever the compilers say, it is recorded where it is timed
            continue
        if taken < BETTER * least:
            best, least = tiles, taken
    return best


def run(recorder: Recorder, _: str, folder: Path = tuned.FOLDER) -> None:
    """A part of run.sh: a row for each kernel that is timed. The file is written if this is a GPU."""
    dry = recorder.dry_run
    found = {}
    for operation, choices in CHOICES.items():
        for size, heads in ({16: (4, 2)} if dry else HEADS).items():
            kernel = _kernel(operation, heads, size, dry)

            def time(tiles: Tiles, kernel=kernel, about=(operation, size)) -> float:
                case = dict(zip(("operation", "head size"), about, strict=True)) | dataclasses.asdict(tiles)
                row = recorder.case(case, lambda: {"us": 1e6 * kernel(tiles)})
                if "us" not in row:
                    raise RuntimeError("not timed")
                return row["us"]

            start = tuned.default_tiles(operation, size, 2)
            chosen = search(start, {"num_stages": (2,)} if dry else choices, time)
            found[operation, size, 2] = chosen
    kind = current_device().kind
    if kind and not dry:
        tuned.write(tuned.file_of(kind, folder), found)


def _kernel(operation: str, heads: tuple[int, int], size: int, dry: bool) -> Time:
    """Seconds of one call, by its tiles."""
    rows, context = (2, 40) if dry else (ROWS, CONTEXT)
    queries = 16 if dry else QUERIES
    width = -(-context // BLOCK_SIZE)
    kv = noise_pool((rows * width + 32) * BLOCK_SIZE * 4 * heads[1] * size, heads[1], size, jnp.bfloat16)
    tables = scattered_tables(rows, context, kv.shape[0], 1)[0]
    lengths = np.full(rows, context, np.int32)
    interpret, options = jax.default_backend() != "gpu", Options(size**-0.5)
    if operation == "decode":
        q = jax.random.normal(jax.random.key(1), (rows, heads[0], size), jnp.bfloat16)
        arguments, absent, attend = (kv, tables, lengths), (None, None), triton.paged_decode_attention
    else:
        q = jax.random.normal(jax.random.key(1), (rows, queries, heads[0], size), jnp.bfloat16)
        starts, counts = lengths - queries, np.full(rows, queries, np.int32)
        arguments, absent, attend = (kv, tables, starts, counts), (None,), triton.paged_prefill_attention  # type: ignore[assignment]

    def time(tiles: Tiles) -> float:
        run = functools.partial(attend, tiles=tiles, interpret=interpret)
        call = jax.jit(lambda *arrays: run(*arrays, *absent, options))
        return seconds(lambda q: call(q, *arguments), q)[0]

    return time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=tuned.FOLDER, help="folder of the file")
    args = parser.parse_args()
    kind = current_device().kind
    if not kind:
        print("tuning needs an NVIDIA GPU", file=sys.stderr)
        return 2
    recorder = Recorder("tune", args.output / "tune.log.json", budget=1e9, dry_run=False)
    run(recorder, "", args.output)
    recorder.finish(None)
    print(tuned.file_of(kind, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
