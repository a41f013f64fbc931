"""Reader of the GGUF container: header, metadata and tensor directory, without trusting one byte of it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

    "GGUF" | u32 version | u64 tensors | u64 entries
    entries: key string | u32 type | value
    tensors: name string | u32 dimensions | u64 each, fastest first | u32 ggml type | u64 offset
    padding to `general.alignment` | tensor data, each tensor aligned

Every count and length is compared with the bytes that are left *before* anything of that size is allocated,
so a hostile file costs no more memory than its own size; every tensor lies inside the file and overlaps no
other.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf_quants import GGML_TYPES, UNSUPPORTED_TYPES, GGMLType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NAME = 65535  # bytes; the specification's limit for keys
_MAX_ALIGNMENT = 1 << 20

_SCALARS = {  # GGUF value type -> little-endian NumPy dtype; 7 is bool, 8 string, 9 array
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies and how it is stored."""

    name: str
    """Name in the file, such as `blk.0.attn_q.weight`."""

    shape: tuple[int, ...]
    """Dimensions in NumPy's order, slowest first (the file has them the other way round)."""

    type: GGMLType
    """How the weights are packed."""

    offset: int
    """First byte, from the beginning of the file."""

    nbytes: int
    """Length in bytes."""


class GGUFFile:
    """A GGUF file mapped into memory.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, list[str] or a NumPy array.
        tensors: name -> `GGUFTensor`, in the file's order.

    The mapping lives until the last array that `rows` returned is gone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Maps and parses `path`.

        Raises:
            CorruptCheckpointError: the file is truncated or contradicts itself.
            UnsupportedCheckpointError: version, byte order or a tensor type that jpaged does not read.
            OSError: the file cannot be opened.
        """
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CorruptCheckpointError(
                    f"{self.path}: {size} bytes are too few for a GGUF file; download it again"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self.path, self._map)
        tensor_count, entry_count = _read_header(cursor)
        self.metadata = _read_metadata(cursor, entry_count)
        self.tensors = _read_directory(cursor, tensor_count, self.metadata)

    def rows(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """A tensor's packed bytes, a read-only uint8 view [rows, bytes per row]; a vector is one row."""
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(prod(tensor.shape[:-1]), -1)

    def release(self, tensor: GGUFTensor, start: int, nbytes: int) -> None:
        """Gives pages of a tensor back to the system; they are read from the file again if needed."""
        release_pages(self._map, tensor.offset + start, nbytes)


def release_pages(mapping: mmap.mmap, offset: int, nbytes: int) -> None:
    """Drops the whole pages within [offset, offset + nbytes) of a file mapping from the resident set."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


class _Cursor:
    """A position in the mapped file; every read is checked against what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0
        self.size = len(data)

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self._path}: corrupt GGUF: {what} (at byte {self.position} of {self.size}); download or convert it again"
        )

    def unsupported(self, what: str) -> NoReturn:
        raise UnsupportedCheckpointError(f"{self._path}: {what}")

    def take(self, length: int, what: str) -> bytes:
        if length > self.size - self.position:
            self.corrupt(f"{what} needs {length} bytes, {self.size - self.position} are left")
        start = self.position
        self.position = start + length
        return self._data[start : self.position]

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def count(self, item_bytes: int, what: str) -> int:
        """A u64 count of things of at least `item_bytes` each: no more than the file can hold."""
        count = self.u64(what)
        if count * item_bytes > self.size - self.position:
            self.corrupt(f"{what} is {count}, more than the rest of the file can hold")
        return count

    def string(self, what: str, maximum: int | None = None) -> str:
        length = self.u64(f"the length of {what}")
        if maximum is not None and length > maximum:
            self.corrupt(f"{what} is {length} bytes long, the limit is {maximum}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.corrupt(f"{what} is not UTF-8: {error.reason}")

    def strings(self, what: str) -> list[str]:
        """An array of strings. A vocabulary and its merges are 100,000 of these: the loop is kept tight."""
        count = self.count(8, f"the number of strings in {what}")
        data, position, size = self._data, self.position, self.size
        length_at, result = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                if position > size:
                    self.corrupt(f"a string in {what} ends {position - size} bytes after the file")
                result.append(data[start:position].decode("utf-8"))
        except struct.error:
            self.corrupt(f"the file ends within {what}")
        except UnicodeDecodeError as error:
            self.corrupt(f"a string in {what} is not UTF-8: {error.reason}")
        self.position = position
        return result

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _BOOL:
            return self._bools(self.take(1, key), key)[0].item()
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()
        if kind == _ARRAY:
            return self._array(key)
        self.corrupt(f"{key!r} has the unknown value type {kind}")

    def _array(self, key: str) -> Any:
        kind = self.u32(f"the element type of {key!r}")
        if kind == _STRING:
            return self.strings(f"{key!r}")
        if kind == _ARRAY:
            self.unsupported(f"metadata {key!r} is an array of arrays, which jpaged does not read")
        if kind != _BOOL and kind not in _SCALARS:
            self.corrupt(f"{key!r} has the unknown element type {kind}")
        dtype = np.dtype(_SCALARS.get(kind, "<u1"))
        count = self.count(dtype.itemsize, f"the length of {key!r}")
        raw = self.take(count * dtype.itemsize, key)
        return self._bools(raw, key) if kind == _BOOL else np.frombuffer(raw, dtype)

    def _bools(self, raw: bytes, key: str) -> NDArray[np.bool_]:
        values = np.frombuffer(raw, np.uint8)
        if values.size and values.max() > 1:
            self.corrupt(f"{key!r} holds a boolean that is neither 0 nor 1")
        return values.astype(np.bool_)


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Returns (number of tensors, number of metadata entries)."""
    magic = cursor.take(4, "the magic number")
    if magic != _MAGIC:
        cursor.position = 0
        cursor.corrupt(f"it starts with {magic!r} instead of {_MAGIC!r}; is it a GGUF file?")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            cursor.unsupported("this GGUF is big-endian; convert it to little-endian (gguf-convert-endian)")
        cursor.unsupported(f"GGUF version {version} is not supported (2 and 3 are); convert the model again")
    # The smallest tensor record and the smallest entry: empty name, one dimension; empty key, one byte.
    return cursor.count(8 + 4 + 8 + 4 + 8, "the number of tensors"), cursor.count(8 + 4 + 1, "the number of entries")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", _MAX_NAME)
        if key in metadata:
            cursor.corrupt(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.u32(f"the type of {key!r}"), key)
    return metadata


def _read_directory(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
    alignment = metadata.get("general.alignment", 32)
    power_of_two = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    if not power_of_two or alignment > _MAX_ALIGNMENT:
        cursor.corrupt(f"general.alignment = {alignment!r} is not a power of two up to {_MAX_ALIGNMENT}")
    relative = [_read_tensor(cursor, alignment) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for tensor in relative:
        if tensor.name in tensors:
            cursor.corrupt(f"tensor {tensor.name!r} appears twice")
        if data_start + tensor.offset + tensor.nbytes > cursor.size:
            excess = data_start + tensor.offset + tensor.nbytes - cursor.size
            cursor.corrupt(f"tensor {tensor.name!r} ends {excess} bytes after the file, which seems truncated")
        tensors[tensor.name] = GGUFTensor(
            tensor.name, tensor.shape, tensor.type, data_start + tensor.offset, tensor.nbytes
        )
    by_offset = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            cursor.corrupt(f"tensors {before.name!r} and {after.name!r} overlap")
    return tensors


def _read_tensor(cursor: _Cursor, alignment: int) -> GGUFTensor:
    """One record of the directory; its offset is still relative to the data section."""
    name = cursor.string("a tensor name", _MAX_NAME)
    dimensions = cursor.u32(f"the number of dimensions of {name!r}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        cursor.corrupt(f"tensor {name!r} has {dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.u64(f"a dimension of {name!r}") for _ in range(dimensions))[::-1]
    kind = cursor.u32(f"the type of {name!r}")
    offset = cursor.u64(f"the offset of {name!r}")
    if kind not in GGML_TYPES:
        readable = ", ".join(known.name for known in GGML_TYPES.values())
        cursor.unsupported(
            f"tensor {name!r} has type {UNSUPPORTED_TYPES.get(kind, kind)}, which jpaged does not read; "
            f"requantise the model to one of {readable}"
        )
    ggml_type = GGML_TYPES[kind]
    if 0 in shape or shape[-1] % ggml_type.block_size:
        cursor.corrupt(f"tensor {name!r} has shape {shape}, impossible for {ggml_type.name}")
    if offset % alignment:
        cursor.corrupt(f"tensor {name!r} has offset {offset}, which is no multiple of {alignment}")
    nbytes = prod(shape) // ggml_type.block_size * ggml_type.type_size
    return GGUFTensor(name, shape, ggml_type, offset, nbytes)
