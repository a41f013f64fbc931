"""The GGUF container: what is right is read, what is wrong is refused before anything large is allocated."""

import resource
import struct
import tracemalloc

import numpy as np
import pytest
from checkpoint_files import (
    F32,
    U32,
    f32,
    gguf_bytes,
    gguf_string,
    llama_metadata,
    llama_shapes,
    random_tensors,
    tiny_llama,
)

from checkpoints.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile
from checkpoints.gguf_config import config_from_gguf
from checkpoints.gguf_params import params_from_gguf
from checkpoints.placement import Target


def write(tmp_path, data: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value(tmp_path, version):
    metadata = {
        "int": -5,
        "unsigned": U32(4_000_000_000),
        "float": 0.5,
        "yes": True,
        "no": False,
        "text": "pages é 🦙",
        "empty": "",
        "texts": ["a", "", "é"],
        "numbers": [1, -2, 3],
        "floats": [0.5, 1.5],
        "flags": [True, False],
    }
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = GGUFFile(write(tmp_path, gguf_bytes(metadata, {"w": (F32, (3, 4), weights.tobytes())}, version)))
    read = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    assert read == metadata
    tensor = file.tensors["w"]
    assert (tensor.shape, tensor.type.name, tensor.nbytes) == ((3, 4), "F32", 48)
    np.testing.assert_array_equal(file.rows(tensor).view(np.float32), weights)


def test_reads_what_the_gguf_package_writes(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_uint64("big", 2**63)
    writer.add_float64("double", 0.1)
    writer.add_array("texts", ["x", "y"])
    weights = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    writer.add_tensor("first", weights[0])
    writer.add_tensor(
        "packed",
        gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "w.gguf")
    assert (file.metadata["big"], file.metadata["double"], file.metadata["texts"]) == (2**63, 0.1, ["x", "y"])
    assert file.tensors["packed"].shape == (5, 64)
    assert all(tensor.offset % 64 == 0 for tensor in file.tensors.values())
    np.testing.assert_array_equal(file.rows(file.tensors["first"]).view(np.float32)[0], weights[0])


def test_release_keeps_the_bytes(tmp_path):
    weights = np.arange(1 << 16, dtype=np.float32)
    file = GGUFFile(write(tmp_path, gguf_bytes({}, {"w": (F32, (1 << 16,), weights.tobytes())})))
    rows = file.rows(file.tensors["w"])
    file.release(file.tensors["w"], 0, weights.nbytes)
    np.testing.assert_array_equal(rows.view(np.float32)[0], weights)


def header(tensors=0, entries=0, version=3, magic=b"GGUF") -> bytes:
    return struct.pack("<4sIQQ", magic, version, tensors, entries)


def tensor_record(name="w", shape=(4,), kind=F32, offset=0, dimensions=None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


HUGE = 2**63
PAD = bytes(256)
CORRUPT = {
    "empty": b"",
    "magic": header(magic=b"GGML") + PAD,
    "tensor count": header(tensors=HUGE) + PAD,
    "entry count": header(entries=HUGE) + PAD,
    "key length": header(entries=1) + struct.pack("<Q", HUGE) + PAD,
    "long key": header(entries=1) + struct.pack("<Q", 70000) + bytes(80000),
    "key is not UTF-8": header(entries=1) + struct.pack("<Q", 2) + b"\xff\xff" + PAD,
    "string length": header(entries=1) + gguf_string("k") + struct.pack("<IQ", 8, HUGE) + PAD,
    "array length": header(entries=1) + gguf_string("k") + struct.pack("<IIQ", 9, 12, HUGE) + PAD,
    "string array length": header(entries=1) + gguf_string("k") + struct.pack("<IIQ", 9, 8, HUGE) + PAD,
    "string in array": header(entries=1) + gguf_string("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + PAD,
    "string array runs out": header(entries=1)
    + gguf_string("k")
    + struct.pack("<IIQQ", 9, 8, 2, 3)
    + b"abc"
    + bytes(5),
    "value type": header(entries=1) + gguf_string("k") + struct.pack("<I", 99) + PAD,
    "element type": header(entries=1) + gguf_string("k") + struct.pack("<IIQ", 9, 99, 1) + PAD,
    "boolean": header(entries=1) + gguf_string("k") + struct.pack("<IB", 7, 2) + PAD,
    "same key twice": header(entries=2) + 2 * (gguf_string("k") + struct.pack("<II", 4, 1)) + PAD,
    "no dimensions": header(tensors=1) + tensor_record(shape=()) + PAD,
    "five dimensions": header(tensors=1) + tensor_record(shape=(1,) * 5) + PAD,
    "dimension count": header(tensors=1) + tensor_record(dimensions=2**31) + PAD,
    "zero dimension": header(tensors=1) + tensor_record(shape=(0,)) + PAD,
    "product overflows 64 bits": header(tensors=1) + tensor_record(shape=(2**32, 2**32, 2**32, 2)) + PAD,
    "offset": header(tensors=1) + tensor_record(offset=2**63 - 2**62) + PAD,
    "unaligned offset": header(tensors=1) + tensor_record(offset=4) + PAD,
    "no whole block": header(tensors=1) + tensor_record(shape=(33,), kind=2) + PAD,
    "data is cut off": header(tensors=1) + tensor_record(shape=(1024,)) + PAD,
    "overlap": header(tensors=2) + tensor_record("a", (16,)) + tensor_record("b", (16,), offset=32) + PAD,
    "same tensor twice": header(tensors=2) + tensor_record("a") + tensor_record("a", offset=32) + PAD,
    "alignment 0": header(entries=1) + gguf_string("general.alignment") + struct.pack("<II", 4, 0) + PAD,
    "alignment 3": header(entries=1) + gguf_string("general.alignment") + struct.pack("<II", 4, 3) + PAD,
    "alignment is text": header(entries=1) + gguf_string("general.alignment") + struct.pack("<IQ", 8, 0) + PAD,
}
UNSUPPORTED = {
    "version 1": (header(version=1) + PAD, "version 1"),
    "version 4": (header(version=4) + PAD, "version 4"),
    "big-endian": (header(version=3 << 24) + PAD, "big-endian"),
    "Q2_K": (header(tensors=1) + tensor_record(shape=(256,), kind=10) + PAD, "Q2_K.*Q4_0"),
    "unknown type": (header(tensors=1) + tensor_record(kind=1234) + PAD, "1234"),
    "array of arrays": (
        header(entries=1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 1) + PAD,
        "array of arrays",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_refuses_contradictions_without_allocating(tmp_path, case):
    path = write(tmp_path, CORRUPT[case])
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=r"model\.gguf") as caught:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "again" in str(caught.value)  # what to do


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_names_what_it_does_not_support(tmp_path, case):
    data, pattern = UNSUPPORTED[case]
    with pytest.raises(UnsupportedCheckpointError, match=pattern):
        GGUFFile(write(tmp_path, data))


def try_to_load(path) -> bool:
    """True if the file loads, False if it is refused with the right kind of error; anything else escapes."""
    from checkpoints import load

    try:
        load(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert path.name in message
    return False


def test_every_truncation_is_refused(tmp_path):
    data = tiny_llama()
    assert try_to_load(write(tmp_path, data))
    for length in [*range(0, 2000, 13), *range(2000, len(data), 1999), len(data) - 1]:
        assert not try_to_load(write(tmp_path, data[:length])), length


def test_flipped_bytes_in_the_header_never_surprise(tmp_path):
    """Every byte before the data, one flip each: load or refuse, but no other exception, no runaway memory."""
    data = tiny_llama()
    end = len(data) - sum(array.nbytes for array in random_tensors(llama_shapes()).values())
    generator = np.random.default_rng(0)
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for position in range(end):
        changed = bytearray(data)
        changed[position] ^= int(generator.integers(1, 256))
        refused += not try_to_load(write(tmp_path, bytes(changed)))
    assert refused > end // 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB on Linux, bytes on macOS


def test_random_garbage_after_the_magic(tmp_path):
    generator = np.random.default_rng(1)
    for _ in range(200):
        body = generator.integers(0, 256, generator.integers(0, 400), dtype=np.uint8).tobytes()
        assert not try_to_load(write(tmp_path, struct.pack("<4sI", b"GGUF", 3) + body))


def test_missing_surplus_and_misshapen_tensors_are_all_listed(tmp_path):
    from checkpoints.errors import MissingWeightsError

    tensors = random_tensors(llama_shapes())
    del tensors["blk.0.ffn_up.weight"], tensors["output_norm.weight"]
    tensors["blk.1.attn_q.weight"] = np.zeros((2, 2), np.float32)
    tensors["blk.0.attn_k.weight"] = np.zeros((8, 32), np.float32)
    file = GGUFFile(write(tmp_path, gguf_bytes(llama_metadata(), f32(tensors))))
    with pytest.raises(MissingWeightsError) as caught:
        params_from_gguf(file, config_from_gguf(file), Target(np.dtype(np.float32)))
    assert set(caught.value.missing) == {"blk.0.ffn_up.weight", "output_norm.weight"}
    assert caught.value.surplus == ("blk.1.attn_q.weight",)
    assert caught.value.misshapen == (("blk.0.attn_k.weight", (16, 32), (8, 32)),)
    for name in ("ffn_up", "output_norm", "blk.1.attn_q", "expected [16, 32], found [8, 32]"):
        assert name in str(caught.value)
