"""Hugging Face tokenizers from local folders, without the rest of transformers."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import CheckpointNotFoundError, CorruptCheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
# What a folder may hold instead of tokenizer.json; these need AutoTokenizer, whose import costs 0.2 s more.
_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    *_OTHER_FORMATS,
)
"""All files of a folder that make up its tokenizer and chat template."""


def fast_tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    """Imports `PreTrainedTokenizerFast` (0.6 s) without the advice to install PyTorch."""
    if "transformers" in sys.modules or _QUIET in os.environ:
        from transformers import PreTrainedTokenizerFast
    else:
        os.environ[_QUIET] = "1"
        try:
            from transformers import PreTrainedTokenizerFast
        finally:
            del os.environ[_QUIET]
    return PreTrainedTokenizerFast


def has_tokenizer(folder: Path) -> bool:
    """Whether there is anything in `folder` that `tokenizer_from_folder` could load."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_OTHER_FORMATS))


def tokenizer_from_folder(folder: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer and chat template in `folder`; never runs code from it and never asks the network.

    Raises:
        CheckpointNotFoundError: there is no tokenizer in the folder.
        CorruptCheckpointError: there is one, and it cannot be read.
    """
    if not has_tokenizer(folder):
        raise CheckpointNotFoundError(
            f"{folder}: there is no tokenizer.json; pass tokenizer= the folder of the model's tokenizer"
        )
    tokenizer_class: Any = fast_tokenizer_class()
    if not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer_class = AutoTokenizer
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise bare Exceptions for malformed files
        raise CorruptCheckpointError(f"{folder}: the tokenizer cannot be read ({error}); download it again") from error
