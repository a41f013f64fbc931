"""Downloads a model from the Hugging Face hub, or says clearly why not and what to use instead."""

from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import HubUnavailableError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*", "adapter_*"]


def download(repo: str, revision: str | None, short_names: Sequence[str]) -> Path:
    """Fetches the safetensors, configurations, tokenizer and chat template of `repo` into the hub's cache.

    What is in the cache already is used, and if the hub is unreachable the cache alone is.

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None for the default branch.
        short_names: names that need no hub, for the error message.

    Returns:
        The local folder.

    Raises:
        HubUnavailableError: offline, unreachable, not found, or not allowed.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    # HTTP, DNS, proxy, TLS, validation, disk: dozens of types in several libraries.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise HubUnavailableError(
            f"{repo!r} is no local path, and the Hugging Face hub does not give it: {type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}\n"
            f"Without the hub, use a short name ({', '.join(short_names)}), a .gguf file, or a folder "
            "with config.json and model.safetensors. For a private or gated model set HF_TOKEN."
        ) from error
    return Path(folder)
