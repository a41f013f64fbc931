"""Which model it is: a digest of its configuration and of a row of each of its arrays."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from checkpoints.spelling import kernel_path, kernel_shape
from jpaged.models.config import ModelConfig

_SAMPLE = 64


def fingerprint(config: ModelConfig, params: Any) -> str:
    """SHA-256 in hex. Another configuration, dtype or training gives another one; the weights are not read whole."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode())
    for path, leaf in sorted(flatten_dict(params).items(), key=lambda item: kernel_path(item[0])):
        shape = kernel_shape(path, leaf.shape)
        digest.update(f"{'/'.join(kernel_path(path))} {shape} {leaf.dtype}".encode())
        middle = tuple(size // 2 for size in shape[:-1])  # of all axes but the last: a row of the kernel
        row = leaf[:_SAMPLE, *middle] if path[-1] == "weight" else leaf[*middle, :_SAMPLE]
        digest.update(np.asarray(row).tobytes())
    return digest.hexdigest()
