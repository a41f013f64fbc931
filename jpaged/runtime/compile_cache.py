"""The persistent compilation cache: what was compiled once is loaded at the next start."""

import os
from pathlib import Path

import jax


def default_dir() -> Path:
    """The user's cache folder for compiled steps."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jpaged" / "xla"


def enable(directory: str | None) -> None:
    """Switches JAX's persistent cache on, for small programs too.

    Args:
      directory: None: `default_dir()`; "": leave everything as it is. A cache that the program has already
        configured (jax_compilation_cache_dir) is kept.
    """
    if directory == "" or (directory is None and jax.config.jax_compilation_cache_dir):
        return
    path = Path(directory) if directory else default_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home is no reason not to run
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
