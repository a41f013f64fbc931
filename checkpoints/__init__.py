"""Anything on disk <-> configuration, Flax parameter tree and tokenizer.

    checkpoint = checkpoints.load("smollm2-135m", dtype="bfloat16")
    checkpoint.config, checkpoint.params, checkpoint.tokenizer
    checkpoints.save("there", checkpoint.config, checkpoint.params, format="orbax", tokenizer=checkpoint.tokenizer)
    checkpoints.convert("smollm2-135m", "there", format="maxtext-scanned")

Reads GGUF files, Hugging Face safetensors folders and Orbax directories of the families in `checkpoints.tables`; the
latter in the layouts of `checkpoints.layout_tables`, which it also writes.
Needs neither PyTorch nor, for GGUF, the `gguf` package; never unpickles, evaluates or downloads code. It imports
nothing of jpaged but `jpaged.models.config`.
"""

from checkpoints.converter import Converted, convert
from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    HubUnavailableError,
    MissingWeightsError,
    UnsupportedCheckpointError,
)
from checkpoints.loader import SHORT_NAMES, Checkpoint, load, read_config
from checkpoints.saver import FORMATS, save
from checkpoints.trees import to_linen

__all__ = [
    "FORMATS",
    "SHORT_NAMES",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Converted",
    "CorruptCheckpointError",
    "HubUnavailableError",
    "MissingWeightsError",
    "UnsupportedCheckpointError",
    "convert",
    "load",
    "read_config",
    "save",
    "to_linen",
]
