"""Writes small checkpoint files for the tests, byte by byte, without any of the libraries that we compare with."""

import json
import struct
from math import prod
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent.parent / "goldens"

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30


class U32(int):
    """An integer that is written as u32 (plain ints become i32)."""


def gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value) -> bytes:
    """Type tag and value."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, U32):
        return struct.pack("<II", 4, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    kind, body = {
        str: (8, lambda: b"".join(map(gguf_string, value))),
        int: (5, lambda: np.array(value, "<i4").tobytes()),
        float: (6, lambda: np.array(value, "<f4").tobytes()),
        bool: (7, lambda: np.array(value, "u1").tobytes()),
    }[type(value[0])]
    return struct.pack("<IIQ", 9, kind, len(value)) + body()


def gguf_bytes(metadata: dict, tensors: dict[str, tuple[int, tuple[int, ...], bytes]], version: int = 3) -> bytes:
    """A GGUF file; tensors are name -> (ggml type, shape in NumPy's order, data)."""
    alignment = metadata.get("general.alignment", 32)
    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += gguf_string(key) + gguf_value(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        out += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw
    return out + b"\0" * (-len(out) % alignment) + data


def llama_metadata(**changes) -> dict:
    """Metadata of a one-layer Llama with a byte-level tokenizer of 16 tokens."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "h",
        "i",
        "hi",
        "Ġ",
        "!",
        "1",
        "2",
        "<tool>",
        "a",
        "b",
        "c",
        "ab",
        "abc",
    ]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": U32(1),
        "llama.context_length": U32(64),
        "llama.embedding_length": U32(32),
        "llama.feed_forward_length": U32(64),
        "llama.attention.head_count": U32(4),
        "llama.attention.head_count_kv": U32(2),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": U32(8),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 7, 4, *[1] * 5],
        "tokenizer.ggml.merges": ["h i", "a b", "ab c"],
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        "tokenizer.ggml.unknown_token_id": U32(0),
        "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
    } | changes
    return {key: value for key, value in metadata.items() if value is not None}


def llama_shapes(vocab=16, hidden=32, width=64, queries=32, keys=16) -> dict[str, tuple[int, ...]]:
    """Tensor shapes that belong to `llama_metadata`, with tied embeddings."""
    return {
        "token_embd.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (queries, hidden),
        "blk.0.attn_k.weight": (keys, hidden),
        "blk.0.attn_v.weight": (keys, hidden),
        "blk.0.attn_output.weight": (hidden, queries),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.ffn_gate.weight": (width, hidden),
        "blk.0.ffn_up.weight": (width, hidden),
        "blk.0.ffn_down.weight": (hidden, width),
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def f32(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    return {name: (F32, array.shape, array.tobytes()) for name, array in tensors.items()}


def tiny_llama(**changes) -> bytes:
    return gguf_bytes(llama_metadata(**changes), f32(random_tensors(llama_shapes())))


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file; tensors are name -> (dtype name, shape, data)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def random_blocks(rows: int, blocks: int, type_size: int, halves: list[int], seed: int = 0) -> np.ndarray:
    """Random packed rows, uint8 [rows, blocks * type_size], whose float16 scales at bytes `halves` are tame."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, type_size), dtype=np.uint8)
    for at in halves:
        scale = generator.uniform(-1, 1, (rows, blocks)).astype("<f2")
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, prod((blocks, type_size)))
