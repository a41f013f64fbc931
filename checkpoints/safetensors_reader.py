"""Zero-copy view of a safetensors file.

Format: https://huggingface.co/docs/safetensors. The `safetensors` library checks the file (header size,
offsets, overlaps, holes, shapes against byte counts); its NumPy interface copies tensors and keeps the file's
pages resident, so the data itself is read through our own mapping, whose pages can be dropped again.
"""

import json
import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import release_pages

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types of weights that jpaged reads."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    """Name in the file."""

    dtype: str
    """Name of its element type, a key of `DTYPES` if it can be read."""

    shape: tuple[int, ...]
    """Dimensions, slowest first."""

    offset: int
    """First byte, from the beginning of the file."""

    nbytes: int
    """Length in bytes."""


class SafetensorsFile:
    """A safetensors file mapped into memory.

    Attributes:
        path: the file.
        tensors: name -> `StoredTensor`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Maps and checks `path`.

        Raises:
            CorruptCheckpointError: the file is truncated or contradicts itself.
            OSError: the file cannot be opened.
        """
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 10:
                raise CorruptCheckpointError(f"{self.path}: too short for a safetensors file; download it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            with safe_open(self.path, framework="np"):
                pass
        except SafetensorError as error:
            raise CorruptCheckpointError(f"{self.path}: corrupt safetensors ({error}); download it again") from error
        (header_bytes,) = struct.unpack("<Q", self._map[:8])
        header = json.loads(self._map[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        self.tensors = {name: _tensor(name, entry, 8 + header_bytes) for name, entry in header.items()}

    def read(self, tensor: StoredTensor) -> NDArray:
        """The tensor as a read-only view of the file.

        Raises:
            UnsupportedCheckpointError: its element type is not one of `DTYPES`.
        """
        if tensor.dtype not in DTYPES:
            raise UnsupportedCheckpointError(
                f"{self.path}: tensor {tensor.name!r} has type {tensor.dtype}, which jpaged does not read "
                f"({', '.join(DTYPES)} are); load the model's unquantised checkpoint"
            )
        count = prod(tensor.shape)
        return np.frombuffer(self._map, DTYPES[tensor.dtype], count, tensor.offset).reshape(tensor.shape)

    def release(self, tensor: StoredTensor, start: int, nbytes: int) -> None:
        """Gives pages of a tensor back to the system; they are read from the file again if needed."""
        release_pages(self._map, tensor.offset + start, nbytes)


def _tensor(name: str, entry: dict, data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)
