"""The tokenizer that a GGUF file describes in its metadata, as a Hugging Face fast tokenizer.

llama.cpp names a pre-tokenizer (`tokenizer.ggml.pre`) instead of writing its regular expressions down, so the
expressions are here; an unknown name is refused, for a guess would give slightly wrong tokens without any
error.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from checkpoints.gguf import GGUFFile
from checkpoints.hf_tokenizer import fast_tokenizer_class

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

# Values of tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_from_gguf(file: GGUFFile) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer, with its special tokens and chat template.

    Raises:
        UnsupportedCheckpointError: a tokenizer model or pre-tokenizer that jpaged does not know.
        CorruptCheckpointError: metadata that is missing or contradicts itself.
    """
    source = _Source(file)
    model = source.meta.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in _MODELS:
        raise UnsupportedCheckpointError(
            f"{file.path}: tokenizer model {model!r} is not supported ({', '.join(_MODELS)} are); "
            "pass tokenizer= a Hugging Face tokenizer folder"
        )
    try:
        return _build(source, _MODELS[model])
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions, as for a merge of unknown tokens
        raise source.corrupt(f"the tokenizer cannot be built ({error})") from error


def _build(source: "_Source", make: "Callable[[_Source], tuple[Tokenizer, bool]]") -> "PreTrainedTokenizerFast":
    backend, add_bos_default = make(source)
    _add_special_tokens(source, backend)
    bos = source.token("bos")
    if bos is not None and source.flag("add_bos_token", add_bos_default):
        _prepend(backend, bos, source.tokens.index(bos))
    template = source.meta.get("tokenizer.chat_template")
    return fast_tokenizer_class()(
        tokenizer_object=_NoCopy(backend),
        bos_token=bos,
        eos_token=source.token("eos"),
        unk_token=source.token("unknown"),
        pad_token=source.token("padding"),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
    )


class _NoCopy:
    """Wraps a backend for PreTrainedTokenizerFast, which would copy it: 0.15 s, and nobody else has it."""

    def __init__(self, backend: "Tokenizer") -> None:
        self._backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self._backend


class _Source:
    """The tokenizer's metadata, checked where it is read."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.meta = file.metadata
        self.tokens = self.strings("tokens")
        self.types = self._types()

    def corrupt(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.path}: {what}; pass tokenizer= a Hugging Face tokenizer folder instead")

    def strings(self, key: str) -> list[str]:
        value = self.meta.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            raise self.corrupt(f"tokenizer.ggml.{key} is no list of strings")
        return value

    def numbers(self, key: str) -> list[Any]:
        """An array with one number per token."""
        values = self.meta.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise self.corrupt(f"tokenizer.ggml.{key} does not hold one number per token")
        return values.tolist()

    def _types(self) -> list[int]:
        if "tokenizer.ggml.token_type" not in self.meta:
            return [1] * len(self.tokens)
        return self.numbers("token_type")

    def token(self, role: str) -> str | None:
        """The text of the bos, eos, unknown or padding token."""
        index = self.meta.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise self.corrupt(f"tokenizer.ggml.{role}_token_id = {index!r} is outside the vocabulary")
        return self.tokens[index]

    def flag(self, key: str, default: bool) -> bool:
        value = self.meta.get(f"tokenizer.ggml.{key}", default)
        return value if isinstance(value, bool) else default

    def vocabulary(self) -> dict[str, int]:
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            raise self.corrupt("the vocabulary holds a token twice")
        return vocabulary


def _byte_level(source: _Source) -> tuple["Tokenizer", bool]:
    """Byte-level BPE ("gpt2"). Returns the tokenizer and whether it adds bos when the file does not say."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = source.meta.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise UnsupportedCheckpointError(
            f"{source.path}: pre-tokenizer {name!r} is not supported ({', '.join(_PRE_TOKENIZERS)} are); "
            "pass tokenizer= a Hugging Face tokenizer folder"
        )
    llama3 = name in ("llama-bpe", "llama3", "llama-v3")
    vocabulary = source.vocabulary()
    merges = [_split(source, merge) for merge in source.strings("merges")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend, llama3


def _split(source: _Source, merge: str) -> tuple[str, str]:
    """The two tokens of a merge: byte-level tokens hold no spaces, so a space separates them."""
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise source.corrupt(f"{merge!r} is no merge of two tokens")
    return left, right


def _sentence_piece(source: _Source) -> tuple["Tokenizer", bool]:
    """SentencePiece BPE ("llama"): merges are not listed; the best scoring union is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = source.vocabulary()
    merges = _merges_by_score(source, vocabulary, source.numbers("scores"))
    unknown = source.token("unknown")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in source.types,
        )
    )
    prefix = source.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_by_score(source: _Source, vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    merges: list[tuple[float, int, int, str, str]] = []
    for token, kind, score in zip(source.tokens, source.types, scores, strict=True):
        if kind not in (_UNKNOWN, _CONTROL, _BYTE) and len(token) <= 256:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocabulary and right in vocabulary:
                    merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(source: _Source, backend: "Tokenizer") -> None:
    """Matches control and user-defined tokens as a whole; decoding can leave out the former."""
    from tokenizers import AddedToken

    kinds = list(zip(source.tokens, source.types, strict=True))
    control = [token for token, kind in kinds if token and kind == _CONTROL]
    user = [token for token, kind in kinds if token and kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])


def _prepend(backend: "Tokenizer", bos: str, index: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, index)]
    )


def _regex(pattern: str) -> "pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> "pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> "pre_tokenizers.PreTokenizer":
    """GPT-2's words, but every digit is a word of its own."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_PRE_TOKENIZERS: dict[Any, Callable[[], "pre_tokenizers.PreTokenizer"]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _regex(_LLAMA3),
    "llama3": lambda: _regex(_LLAMA3),
    "llama-v3": lambda: _regex(_LLAMA3),
    "qwen2": lambda: _regex(_QWEN2),
}

_MODELS: dict[Any, Callable[[_Source], tuple["Tokenizer", bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentence_piece,
}
