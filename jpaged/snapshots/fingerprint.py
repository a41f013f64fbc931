"""Which model it is: a digest of its configuration and of a row of each of its arrays."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from jpaged.models.config import ModelConfig

_SAMPLE = 64


def fingerprint(config: ModelConfig, params: Any) -> str:
    """SHA-256 in hex. Another configuration, dtype or training gives another one; the weights are not read whole."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        row = leaf[tuple(size // 2 for size in leaf.shape[:-1])]  # of the last axis
        digest.update(np.asarray(row[:_SAMPLE]).tobytes())
    return digest.hexdigest()
