"""Tile shapes that were measured to be the fastest on one kind of GPU, in `pallas_kernels/tuned/KIND.json`.

`python -m benchmarks.gpu.tune` writes the file of the GPU that it runs on. GPUs without a file take the defaults of
`tiles`, which were reasoned out and not measured.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

from pallas_kernels.dispatch import current_device
from pallas_kernels.paged_attention.tiles import Tiles, decode_tiles, prefill_tiles

FOLDER = Path(__file__).parent.parent / "tuned"

Key = tuple[str, int, int]
"""Operation, head size, bytes of a query's number."""


def tiles_for(operation: str, head_size: int, itemsize: int) -> Tiles:
    """Tiles of "decode" or "prefill" on the device that is traced for."""
    kind = current_device().kind
    known = read(file_of(kind)) if kind else {}
    return known.get((operation, head_size, itemsize)) or default_tiles(operation, head_size, itemsize)


def default_tiles(operation: str, head_size: int, itemsize: int) -> Tiles:
    """Tiles where nothing was measured."""
    if operation == "decode":
        return decode_tiles(head_size, itemsize)
    return prefill_tiles(head_size, itemsize, current_device().capability)


def file_of(kind: str, folder: Path = FOLDER) -> Path:
    """Where the tiles of a kind of GPU ("NVIDIA H200") are."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"


@functools.cache
def read(path: Path) -> dict[Key, Tiles]:
    """What is known; nothing, if there is no file.

    Raises:
      ValueError: the file does not say what this version wants to know.
    """
    try:
        entries = json.loads(path.read_text())
        return {(e["operation"], e["head_size"], e["itemsize"]): Tiles(**e["tiles"]) for e in entries}
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not of this version ({error}): run benchmarks.gpu.tune again, or delete it"
        ) from error


def write(path: Path, found: dict[Key, Tiles]) -> None:
    """Adds to the file; what it says of other keys stays."""
    known = read(path) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"operation": operation, "head_size": size, "itemsize": itemsize, "tiles": dataclasses.asdict(tiles)}
        for (operation, size, itemsize), tiles in sorted(known.items())
    ]
    path.write_text(json.dumps(entries, indent=1) + "\n")
    read.cache_clear()
