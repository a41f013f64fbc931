"""Configuration and parameter tree -> a directory that jpaged, and whoever else knows its format, can read."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import CheckpointError
from checkpoints.hf_config import config_to_hf
from checkpoints.layout_tables import WRITTEN
from checkpoints.layouts import by_key, encode, stored_shapes
from checkpoints.leaves import Leaf, check_tensors
from checkpoints.orbax import save_tree
from checkpoints.safetensors_writer import write_shards
from checkpoints.spelling import kernel_path, turned
from checkpoints.tables import leaves_of
from jpaged.models.config import ModelConfig, config_from_hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("safetensors", *WRITTEN)
"""What `save` writes: a Hugging Face folder, or an Orbax directory with the tree of one of the layouts."""

_MAX_SHARD_BYTES = 5_000_000_000


def save(
    path: str | os.PathLike[str],
    config: ModelConfig | Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    format: str = "orbax",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint. It appears under its name when it is complete, or not at all.

    Args:
        path: the directory to make.
        config: the model; or the contents of its Hugging Face config.json, which is then kept as it is.
        params: the parameter tree of `checkpoints.tables`: NumPy or JAX arrays of one element type.
        format: one of `FORMATS`. All but "safetensors" are Orbax directories with a config.json.
        tokenizer: saved beside the weights.
        generation_config: contents of generation_config.json, if there is to be one.
        overwrite: replace what is at `path`.
        max_shard_bytes: "safetensors": most bytes of tensors in one file.

    Raises:
        CheckpointError: an unknown format, or `path` exists.
        UnsupportedCheckpointError: the format has no table for this family; the message lists those that it has.
        MissingWeightsError: `params` is not the tree of `config`.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    model = config if isinstance(config, ModelConfig) else config_from_hf(config)
    leaves = list(leaves_of(model))
    flat = {kernel_path(path): turned(path, array) for path, array in _flatten(params)}
    check_tensors(
        "params",
        {"/".join(leaf.path): leaf.spec.shape for leaf in leaves},
        {"/".join(path): tuple(array.shape) for path, array in flat.items()},
    )
    dtype = np.dtype(flat[leaves[0].path].dtype).name
    values = config_to_hf(model, dtype) if isinstance(config, ModelConfig) else {**config, "dtype": dtype}
    values.pop("torch_dtype", None)
    with whole_directory(Path(path), overwrite) as folder:
        if format == "safetensors":
            folder.mkdir()
            _save_folder(folder, leaves, flat, max_shard_bytes)
        else:
            _save_orbax(folder, model, flat, format)
        _write_json(folder / "config.json", values)
        if generation_config:
            _write_json(folder / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextmanager
def whole_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to be made beside `path`, which takes its name when the block ends without an error.

    Raises:
        CheckpointError: `path` exists and may not be replaced, or the file system refuses.
    """
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; choose another name, or pass overwrite=True (--overwrite)")
    made, old = (path.parent / f".{path.name}.{kind}-{os.getpid()}" for kind in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield made
        if path.exists():
            path.rename(old)
        made.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not path.exists():
            with suppress(OSError):
                old.rename(path)
        for leftover in (made, old):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif leftover.exists():
                leftover.unlink()


def _save_folder(folder: Path, leaves: list[Leaf], flat: Mapping[tuple[str, ...], Any], max_shard_bytes: int) -> None:
    where = {name: (leaf, number) for leaf in leaves for number, name in enumerate(leaf.names)}

    def tensor(name: str) -> NDArray:
        leaf, number = where[name]
        array = flat[leaf.path][number] if leaf.spec.stacked else flat[leaf.path]
        return np.asarray(array).swapaxes(-1, -2) if leaf.spec.transposed else np.asarray(array)

    write_shards(
        folder,
        {name: leaf.stored_shape for name, (leaf, _) in where.items()},
        lambda name: np.dtype(flat[where[name][0].path].dtype),
        tensor,
        max_shard_bytes,
    )


def _save_orbax(folder: Path, config: ModelConfig, flat: Mapping[tuple[str, ...], Any], format: str) -> None:
    below, table, item = WRITTEN[format]
    layout = table(config)
    shapes, tail = stored_shapes(layout), ("value",) if format in ("nnx", "tunix") else ()
    save_tree(
        folder,
        {
            (*below, *key, *tail): encode(links, shapes[key], lambda path: flat[path])
            for key, links in by_key(layout).items()
        },
        item,
    )


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _flatten(node, (*path, key))
        else:
            yield (*path, key), node


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")
