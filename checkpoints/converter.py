"""Any checkpoint that jpaged reads -> any format that it writes."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.arrays import Progress
from checkpoints.hf_tokenizer import TOKENIZER_FILES
from checkpoints.huggingface import read_json
from checkpoints.loader import load, load_tokenizer
from checkpoints.saver import save, whole_directory


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did."""

    model_type: str
    """The family."""

    parameters: int
    """How many numbers."""

    dtype: str
    """Their element type."""

    source: str
    """What was read."""

    files: tuple[str, ...]
    """Names of what was written."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Reads a checkpoint and writes it in another format, with its configuration and tokenizer.

    Args:
        source: whatever `checkpoints.load` takes.
        target: the directory to make; it appears when it is complete, or not at all.
        format: one of `checkpoints.FORMATS`.
        dtype: element type to write; "auto" keeps that of the source. See `checkpoints.load`.
        overwrite: replace what is at `target`.
        progress: see `checkpoints.load`.

    Raises:
        CheckpointError: see `checkpoints.load` and `checkpoints.save`.
    """
    path = Path(target)
    with whole_directory(path, overwrite) as made:
        checkpoint = load(source, dtype=dtype, skip_tokenizer=True, progress=progress)
        folder = checkpoint.config_folder
        copied = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else []
        save(
            made,
            read_json(folder / "config.json") if folder else checkpoint.config,
            checkpoint.params,
            format=format,
            tokenizer=None if folder else load_tokenizer(source),
            generation_config=checkpoint.generation_config,
        )
        for file in copied:
            shutil.copyfile(file, made / file.name)
        files = tuple(sorted(file.name for file in made.iterdir()))
    leaves = list(_leaves(checkpoint.params))
    return Converted(
        model_type=checkpoint.config.model_type,
        parameters=sum(leaf.size for leaf in leaves),
        dtype=leaves[0].dtype.name,
        source=checkpoint.source,
        files=files,
    )


def _leaves(tree: Mapping[str, Any]) -> Iterator[Any]:
    for node in tree.values():
        if isinstance(node, Mapping):
            yield from _leaves(node)
        else:
            yield node
