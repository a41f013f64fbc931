"""Anything on disk -> configuration, Flax parameter tree and tokenizer.

    checkpoint = checkpoints.load("smollm2-135m", dtype="bfloat16")
    checkpoint.config, checkpoint.params, checkpoint.tokenizer

Reads GGUF files, Hugging Face safetensors folders and Orbax directories of the families in `checkpoints.tables`.
Needs neither PyTorch nor, for GGUF, the `gguf` package; never unpickles, evaluates or downloads code. It imports
nothing of jpaged but `jpaged.models.config`.
"""

from checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    HubUnavailableError,
    MissingWeightsError,
    UnsupportedCheckpointError,
)
from checkpoints.loader import SHORT_NAMES, Checkpoint, load

__all__ = [
    "SHORT_NAMES",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "HubUnavailableError",
    "MissingWeightsError",
    "UnsupportedCheckpointError",
    "load",
]
