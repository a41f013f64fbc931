"""A Hugging Face folder (config.json, *.safetensors) of any supported family -> configuration and parameter tree."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.arrays import DTYPES, Task, copy_cast
from checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from checkpoints.leaves import Leaf, check_tensors, read_params
from checkpoints.placement import Index, Target
from checkpoints.safetensors_reader import SafetensorsFile, StoredTensor
from checkpoints.tables import ignored_names, leaves_of, whole_names
from jpaged.models.config import ModelConfig, config_from_hf, token_ids

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_JSON = 64 << 20  # bytes; the largest index of a published model is about 10 MB


def config_from_folder(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads config.json and generation_config.json.

    Returns:
        The configuration (end tokens of both files united) and the generation configuration ({} if absent).

    Raises:
        CheckpointNotFoundError: there is no config.json.
        CorruptCheckpointError: not JSON, or not an object.
        UnsupportedCheckpointError: the weights are quantised.
        ModelConfigError: see `config_from_hf`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(_what_else(folder))
    raw = read_json(path)
    if raw.get("quantization_config"):
        raise UnsupportedCheckpointError(
            f"{folder}: quantised Hugging Face weights are not supported; load unquantised or GGUF ones"
        )
    config = config_from_hf(raw)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    more = token_ids(generation.get("eos_token_id"), "generation_config.eos_token_id", config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more))), generation


def params_from_folder(folder: Path, config: ModelConfig, target: Target) -> dict[str, Any]:
    """Reads all safetensors of `folder`, tensor by tensor, into the tree of `checkpoints.tables`.

    Returns:
        Nested dict of arrays, see `Checkpoint.params`.

    Raises:
        CheckpointNotFoundError: no weights.
        CorruptCheckpointError: a damaged file or index.
        UnsupportedCheckpointError: pickled weights, or an element type that jpaged does not read.
        MissingWeightsError: the tensors are not those that `config` asks for.
    """
    where: dict[str, tuple[SafetensorsFile, StoredTensor]] = {}
    for path in _weight_files(folder):
        file = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            if name in where:
                raise CorruptCheckpointError(f"{path}: tensor {name!r} is in another file of the checkpoint, too")
            where[name] = (file, tensor)
    where = dict(zip(whole_names(config, list(where)), where.values(), strict=True))
    wanted = list(leaves_of(config))
    ignored = re.compile("|".join(ignored_names(config)))
    check_tensors(
        str(folder),
        {name: leaf.stored_shape for leaf in wanted for name in leaf.names},
        {name: tensor.shape for name, (_, tensor) in where.items() if not ignored.search(name)},
    )
    return read_params(wanted, target, partial(_tasks, where))


def dtype_of_folder(folder: Path) -> np.dtype:
    """The widest element type of the folder's tensors; float32 where that is wider or integers are among them."""
    names = {tensor.dtype for path in _weight_files(folder) for tensor in SafetensorsFile(path).tensors.values()}
    return {"BF16": DTYPES["bfloat16"], "F16": DTYPES["float16"]}.get("".join(names), DTYPES["float32"])


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object from an untrusted file; raises `CorruptCheckpointError` if it is anything else."""
    if path.stat().st_size > _MAX_JSON:
        raise CorruptCheckpointError(f"{path}: larger than {_MAX_JSON} bytes, which no configuration is")
    try:
        value = json.loads(path.read_bytes())
    # ValueError is bad JSON, bad UTF-8, or an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, by the index if there is one."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        names = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else []
        if not names or not all(_plain_name(name) for name in names):
            raise CorruptCheckpointError(f"{folder / _INDEX}: weight_map must map tensors to files of this folder")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointNotFoundError(f"{folder}: shards are missing, download them: {', '.join(sorted(absent))}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise _no_weights(folder)


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UnsupportedCheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is read, so jpaged never does; "
            "download the model's safetensors or convert it (https://huggingface.co/spaces/safetensors/convert)"
        )
    return CheckpointNotFoundError(f"{folder}: there is neither model.safetensors nor {_INDEX}; download the weights")


def _what_else(folder: Path) -> str:
    gguf = sorted(folder.glob("*.gguf"))
    hint = f"pass the file {gguf[0]} itself" if gguf else "pass a Hugging Face model folder or a .gguf file"
    return f"{folder}: there is no config.json in this folder; {hint}"


def _tasks(
    where: Mapping[str, tuple[SafetensorsFile, StoredTensor]], leaf: Leaf, index: Index, array: NDArray
) -> Iterator[Task]:
    """Cuts a part of one leaf into ranges of the file's rows of about 1 M weights."""
    names, targets = leaf.names, [array]
    if leaf.spec.stacked:
        names, targets, index = names[index[0]], list(array), index[1:]
    first, *others = index[::-1] if leaf.spec.transposed else index
    for name, target in zip(names, targets, strict=True):
        file, tensor = where[name]
        source = file.read(tensor)
        step = max(256, (1 << 20) // (source.size // len(source)))
        for start in range(first.start, first.stop, step):
            stop = min(start + step, first.stop)
            rows = slice(start - first.start, stop - first.start)
            part = target[:, rows] if leaf.spec.transposed else target[rows]
            yield _task(file, tensor, source, (slice(start, stop), *others), part, leaf.spec.transposed)


def _task(
    file: SafetensorsFile,
    tensor: StoredTensor,
    source: NDArray,
    index: Index,
    target: NDArray,
    transposed: bool,
) -> Task:
    """Fills `target` with some rows of a tensor, or with some columns of them."""

    def run() -> None:
        part = source[index]
        copy_cast(part.T if transposed else part, target)
        row = source.strides[0]
        file.release(tensor, index[0].start * row, (index[0].stop - index[0].start) * row)

    return Task(tensor.name, target.nbytes, run)
