"""Dequantisation of GGUF tensors, vectorised over blocks, in NumPy.

GGML quantises a row in blocks of 32 or 256 weights; a block packs its scales and the small integers in a few
bytes. Layouts are those of ggml's `ggml-common.h` (block_q4_0 ... block_q6_K).

Every function has one signature, `dequantize(raw, out)`:

    raw   uint8    [..., bytes per block, lanes]
    out   float32  [..., weights per block, lanes]     written in place

The byte (and weight) index within a block is the axis before the last; the last axis runs over independent
blocks, the *lanes*. That makes both wishes of a loader cheap. To keep GGUF's [out, in] order, pass transposed
views. To get the [in, out] order of Flax kernels, transpose the packed *bytes* first, with output rows as
lanes: 4-bit bytes are a sixth of the floats they become, and all arithmetic then runs over long contiguous
lanes and lands in its final place.

NumPy releases the GIL in each of these operations, so threads scale. The plain types (F32, F16, BF16) have no
blocks: they are viewed as arrays of their `dtype`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GGMLType:
    """How one tensor type is stored."""

    name: str
    """Name as llama.cpp prints it."""

    block_size: int
    """Weights per block; the fastest dimension of a tensor is a multiple of it."""

    type_size: int
    """Bytes per block."""

    dequantize: Callable[[Bytes, Floats], None] | None = None
    """Expands blocks; see the module's docstring. None for plain types."""

    dtype: np.dtype | None = None
    """NumPy type of a plain tensor, little-endian. None for quantised types."""


def _half(raw: Bytes, at: int) -> Floats:
    """The little-endian float16 at byte `at` of every block, as float32 [..., 1, lanes]."""
    low = raw[..., at : at + 1, :].astype(np.uint16)
    high = raw[..., at + 1 : at + 2, :].astype(np.uint16)
    return (low | (high << 8)).view(np.float16).astype(np.float32)


def _q8_0(raw: Bytes, out: Floats) -> None:
    """d: f16 | q: 32 x int8. w = d * q"""
    out[...] = raw[..., 2:34, :].view(np.int8)
    out *= _half(raw, 0)


def _q4_0(raw: Bytes, out: Floats) -> None:
    """d: f16 | 16 bytes: low nibbles are weights 0-15, high nibbles 16-31. w = d * (q - 8)"""
    packed = raw[..., 2:18, :]
    out[..., :16, :] = packed & 15
    out[..., 16:, :] = packed >> 4
    out -= np.float32(8)
    out *= _half(raw, 0)


def _q4_1(raw: Bytes, out: Floats) -> None:
    """d: f16 | m: f16 | 16 bytes of nibbles as in Q4_0. w = d * q + m"""
    packed = raw[..., 4:20, :]
    out[..., :16, :] = packed & 15
    out[..., 16:, :] = packed >> 4
    out *= _half(raw, 0)
    out += _half(raw, 2)


def _fifth_bits(raw: Bytes, at: int) -> Bytes:
    """Bit i of the 4 bytes at `at`, times 16, for weight i: uint8 [..., 32, lanes]."""
    spread = np.repeat(raw[..., at : at + 4, :], 8, axis=-2)
    shifts = np.tile(np.arange(8, dtype=np.uint8), 4)[:, None]
    return ((spread >> shifts) & np.uint8(1)) << np.uint8(4)


def _five_bit(raw: Bytes, out: Floats, high_at: int, low_at: int) -> None:
    high = _fifth_bits(raw, high_at)
    packed = raw[..., low_at : low_at + 16, :]
    out[..., :16, :] = (packed & 15) | high[..., :16, :]
    out[..., 16:, :] = (packed >> 4) | high[..., 16:, :]


def _q5_0(raw: Bytes, out: Floats) -> None:
    """d: f16 | 32 fifth bits | 16 bytes of nibbles. w = d * (q - 16)"""
    _five_bit(raw, out, high_at=2, low_at=6)
    out -= np.float32(16)
    out *= _half(raw, 0)


def _q5_1(raw: Bytes, out: Floats) -> None:
    """d: f16 | m: f16 | 32 fifth bits | 16 bytes of nibbles. w = d * q + m"""
    _five_bit(raw, out, high_at=4, low_at=8)
    out *= _half(raw, 0)
    out += _half(raw, 2)


def _scales_and_mins(raw: Bytes) -> tuple[Floats, Floats]:
    """Eight scales times d and eight minima times dmin, of Q4_K and Q5_K: float32 [..., 8, lanes] each.

    They are 6-bit integers in twelve bytes, b. Sub-blocks 0-3 lie in the low six bits of b[0:4] (scale) and
    b[4:8] (min). Sub-blocks 4-7 have their low four bits in the nibbles of b[8:12], and their high two bits
    on top of b[0:4] and b[4:8].
    """
    first, second, third = raw[..., 4:8, :], raw[..., 8:12, :], raw[..., 12:16, :]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-2)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-2)
    return _half(raw, 0) * scales, _half(raw, 2) * mins


def _q4_k(raw: Bytes, out: Floats) -> None:
    """d: f16 | dmin: f16 | 12 bytes of scales and minima | 128 bytes of nibbles.

    Eight sub-blocks of 32 weights. Byte group i of 32 holds sub-block 2i in its low and 2i + 1 in its high
    nibbles. w = (d * scale) * q - dmin * min
    """
    scales, mins = _scales_and_mins(raw)
    for sub in range(8):
        packed = raw[..., 16 + 32 * (sub // 2) :, :][..., :32, :]
        part = out[..., 32 * sub : 32 * sub + 32, :]
        part[...] = packed >> 4 if sub % 2 else packed & 15
        part *= scales[..., sub : sub + 1, :]
        part -= mins[..., sub : sub + 1, :]


def _q5_k(raw: Bytes, out: Floats) -> None:
    """As Q4_K, with 32 bytes before the nibbles: bit s of byte i is weight i of sub-block s's fifth bit."""
    scales, mins = _scales_and_mins(raw)
    high = raw[..., 16:48, :]
    for sub in range(8):
        packed = raw[..., 48 + 32 * (sub // 2) :, :][..., :32, :]
        part = out[..., 32 * sub : 32 * sub + 32, :]
        part[...] = (packed >> 4 if sub % 2 else packed & 15) | ((high >> sub) & 1) << 4
        part *= scales[..., sub : sub + 1, :]
        part -= mins[..., sub : sub + 1, :]


def _q6_k(raw: Bytes, out: Floats) -> None:
    """128 bytes of low nibbles | 64 bytes of high bit pairs | 16 x int8 scales | d: f16.

    Two halves of 128 weights; each is four runs of 32. In a half, runs 0 and 1 take the low nibbles of byte
    groups 0 and 1, runs 2 and 3 the high nibbles; run r takes bit pair r of the half's 32 high bytes. A scale
    serves 16 weights. w = (d * scale) * (q - 32)
    """
    scales = _half(raw, 208) * raw[..., 192:208, :].view(np.int8)
    for run in range(8):
        half, r = divmod(run, 4)
        packed = raw[..., 64 * half + 32 * (r % 2) :, :][..., :32, :]
        high = (raw[..., 128 + 32 * half : 160 + 32 * half, :] >> (2 * r)) & 3
        part = out[..., 32 * run : 32 * run + 32, :]
        part[...] = (packed >> 4 if r >= 2 else packed & 15) | high << 4
        part -= np.float32(32)
        part[..., :16, :] *= scales[..., 2 * run : 2 * run + 1, :]
        part[..., 16:, :] *= scales[..., 2 * run + 1 : 2 * run + 2, :]


GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, dtype=np.dtype("<f4")),
    1: GGMLType("F16", 1, 2, dtype=np.dtype("<f2")),
    2: GGMLType("Q4_0", 32, 18, _q4_0),
    3: GGMLType("Q4_1", 32, 20, _q4_1),
    6: GGMLType("Q5_0", 32, 22, _q5_0),
    7: GGMLType("Q5_1", 32, 24, _q5_1),
    8: GGMLType("Q8_0", 32, 34, _q8_0),
    12: GGMLType("Q4_K", 256, 144, _q4_k),
    13: GGMLType("Q5_K", 256, 176, _q5_k),
    14: GGMLType("Q6_K", 256, 210, _q6_k),
    30: GGMLType("BF16", 1, 2, dtype=np.dtype(ml_dtypes.bfloat16)),
}
"""Tensor types that jpaged reads, by their number in the file."""

# fmt: off
UNSUPPORTED_TYPES: dict[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
"""Known types that jpaged does not read, for error messages."""
# fmt: on
