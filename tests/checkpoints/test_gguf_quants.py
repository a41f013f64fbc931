"""Dequantisation against a scalar transcription of the formats, and against the `gguf` package."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, random_blocks

from checkpoints.arrays import expand
from checkpoints.gguf_quants import GGML_TYPES

HALVES = {
    Q4_0: [0],
    Q4_1: [0, 2],
    Q5_0: [0],
    Q5_1: [0, 2],
    Q8_0: [0],
    Q4_K: [0, 2],
    Q5_K: [0, 2],
    Q6_K: [208],
}
"""Where the float16 numbers of a block are."""

IDS = [GGML_TYPES[kind].name for kind in HALVES]


def half(block: bytes, at: int) -> np.float32:
    return np.frombuffer(block, "<f2", 1, at)[0].astype(np.float32)


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def scalar_q32(kind: int, block: bytes) -> list[np.float32]:
    """One block of 32 weights, a weight at a time."""
    d, result = half(block, 0), []
    if kind == Q8_0:
        return [d * np.float32(signed(byte)) for byte in block[2:]]
    has_min, five = kind in (Q4_1, Q5_1), kind in (Q5_0, Q5_1)
    bits = int.from_bytes(block[4:8] if kind == Q5_1 else block[2:6], "little") if five else 0
    nibbles = block[-16:]
    for i in range(32):
        q = nibbles[i] & 15 if i < 16 else nibbles[i - 16] >> 4
        q += 16 * (bits >> i & 1)
        offset = 0 if has_min else 16 if five else 8
        weight = d * np.float32(q - offset)
        result.append(weight + half(block, 2) if has_min else weight)
    return result


def scalar_scale_min(b: bytes, j: int) -> tuple[int, int]:
    """Sub-block j's scale and minimum out of Q4_K's twelve bytes."""
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return (b[j + 4] & 15) | (b[j - 4] >> 6 << 4), (b[j + 4] >> 4) | (b[j] >> 6 << 4)


def scalar_q4_q5_k(kind: int, block: bytes) -> list[np.float32]:
    result = []
    nibbles = block[-128:]
    for i in range(256):
        j, within = divmod(i, 32)
        byte = nibbles[j // 2 * 32 + within]
        q = byte >> 4 if j % 2 else byte & 15
        if kind == Q5_K:
            q += 16 * (block[16 + within] >> j & 1)
        scale, minimum = scalar_scale_min(block[4:16], j)
        result.append(half(block, 0) * np.float32(scale) * np.float32(q) - half(block, 2) * np.float32(minimum))
    return result


def scalar_q6_k(block: bytes) -> list[np.float32]:
    low, high, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
    result = []
    for i in range(256):
        part, run, within = i // 128, i % 128 // 32, i % 32
        byte = low[part * 64 + run % 2 * 32 + within]
        q = (byte >> 4 if run >= 2 else byte & 15) | (high[part * 32 + within] >> 2 * run & 3) << 4
        result.append(d * np.float32(signed(scales[i // 16])) * np.float32(q - 32))
    return result


def scalar(kind: int, raw: np.ndarray) -> np.ndarray:
    size = GGML_TYPES[kind].type_size
    one = scalar_q6_k if kind == Q6_K else lambda b: (scalar_q4_q5_k if kind in (Q4_K, Q5_K) else scalar_q32)(kind, b)
    return np.array([[w for at in range(0, len(row), size) for w in one(bytes(row[at : at + size]))] for row in raw])


@pytest.mark.parametrize("kind", HALVES, ids=IDS)
@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "transposed"])
def test_equals_the_scalar_formula_bit_for_bit(kind, transpose):
    ggml_type = GGML_TYPES[kind]
    raw = random_blocks(5, 3, ggml_type.type_size, HALVES[kind])
    expected = scalar(kind, raw)
    out = np.empty((3 * ggml_type.block_size, 5) if transpose else (5, 3 * ggml_type.block_size), np.float32)
    expand(raw, ggml_type, out, transpose=transpose)
    np.testing.assert_array_equal(out.T if transpose else out, expected)


@pytest.mark.parametrize("kind", HALVES, ids=IDS)
def test_tiles_do_not_show(kind):
    """More rows and blocks than one tile holds, and a cast."""
    ggml_type = GGML_TYPES[kind]
    raw = random_blocks(300, 9, ggml_type.type_size, HALVES[kind])
    width = 9 * ggml_type.block_size
    rows, columns = np.empty((300, width), np.float32), np.empty((width, 300), np.float32)
    cast = np.empty((width, 300), ml_dtypes.bfloat16)
    expand(raw, ggml_type, rows, transpose=False)
    expand(raw, ggml_type, columns, transpose=True)
    expand(raw, ggml_type, cast, transpose=True)
    np.testing.assert_array_equal(rows, columns.T)
    np.testing.assert_array_equal(cast, columns.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rows[::97], scalar(kind, raw[::97]))


@pytest.mark.parametrize("kind", HALVES, ids=IDS)
def test_agrees_with_the_gguf_package(kind):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    ggml_type, reference_type = GGML_TYPES[kind], constants.GGMLQuantizationType(kind)
    assert reference_type.name == ggml_type.name
    assert constants.GGML_QUANT_SIZES[reference_type] == (ggml_type.block_size, ggml_type.type_size)
    raw = random_blocks(64, 4, ggml_type.type_size, HALVES[kind], seed=1)
    out = np.empty((64, 4 * ggml_type.block_size), np.float32)
    expand(raw, ggml_type, out, transpose=False)
    np.testing.assert_array_equal(out, quants.dequantize(raw, reference_type))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_undoes_the_gguf_packages_quantisation(name):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    kind = constants.GGMLQuantizationType[name]
    weights = np.random.default_rng(2).standard_normal((32, 128), np.float32)
    out = np.empty_like(weights)
    expand(quants.quantize(weights, kind), GGML_TYPES[kind], out, transpose=False)
    # Half a step of the widest block: the range of a block is about 5, over 15 (4 bit) to 255 (8 bit) steps.
    assert np.abs(out - weights).max() < {"4": 0.5, "5": 0.25, "8": 0.03}[name[1]]


def test_infinite_scales_give_nan_and_no_warning():
    raw = np.full((1, 18), 255, np.uint8)  # d = NaN
    out = np.empty((1, 32), np.float32)
    expand(raw, GGML_TYPES[Q4_0], out, transpose=False)
    assert np.isnan(out).all()
