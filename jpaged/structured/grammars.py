"""Grammars: what requests ask for, compiled by llguidance for one tokenizer.

Schemas and expressions come from strangers. What keeps a hostile one to itself: the sizes that
`StructuredOutputsParams` checks, llguidance's own limits on the work of compiling and of each step (`compiling.py`),
and a trial in a process that can be killed (`trials.py`).
"""

import collections
import concurrent.futures
import json
import threading
from typing import TYPE_CHECKING

from jpaged.errors import InvalidRequestError
from jpaged.structured.matching import Matcher
from jpaged.structured.params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from jpaged.tokenization import Tokenizer

MAX_COMPILED = 64
"""Compiled grammars that are kept."""
_HARMLESS = ("choice", "json_object")
"""Kinds that need no trial: they are texts, or always the same."""
_Key = tuple[str, str]


class Grammars:
    """Compiled grammars of one engine; thread-safe, so that a server can compile before its engine's thread asks.

    Args:
      tokenizer: the engine's.
      vocab_size: of the model; the masks have at least so many bits.
      eos_token_ids: tokens that end an output; one at least.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._compiler: _Compiler | None = None
        self._compiled: collections.OrderedDict[_Key, Matcher] = collections.OrderedDict()
        self._compiling: dict[_Key, concurrent.futures.Future[Matcher]] = {}
        self._lock = threading.Lock()

    def __contains__(self, params: StructuredOutputsParams) -> bool:
        """Whether its matcher is at hand."""
        return (params.kind, params.text) in self._compiled

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A matcher at the beginning of the grammar.

        Raises:
          InvalidRequestError: it can't be compiled, not within the limits, or allows no output.
          QueueFullError: too many others are being compiled.
        """
        key = params.kind, params.text
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key].fork()
            others = self._compiling.get(key)
            if others is None:
                mine = self._compiling[key] = concurrent.futures.Future()
        compiled = others.result() if others is not None else self._compile(key, mine)
        with self._lock:
            return compiled.fork()

    def close(self) -> None:
        """Ends what is being compiled."""
        if self._compiler is not None:
            self._compiler.trials.close()

    def _compile(self, key: _Key, future: "concurrent.futures.Future[Matcher]") -> Matcher:
        """Who asks for the same grammar meanwhile waits for the future."""
        try:
            compiled = self._get_compiler()(*key)
            with self._lock:
                self._compiled[key] = compiled
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            future.set_result(compiled)
            return compiled
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            del self._compiling[key]

    def _get_compiler(self) -> "_Compiler":
        with self._lock:
            if self._compiler is None:
                self._compiler = _Compiler(self._hf_tokenizer, self._vocab_size, self._eos)
            return self._compiler


class _Compiler:
    """Made when the first grammar is needed: the tokenizer takes a second."""

    def __init__(self, hf_tokenizer: "Tokenizer", vocab_size: int, eos: list[int]) -> None:
        from jpaged.structured import compiling
        from jpaged.structured.trials import Trials

        backend = hf_tokenizer.backend_tokenizer
        settings = json.loads(backend.to_str())
        settings["padding"] = settings["truncation"] = None
        size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
        arguments = json.dumps(settings), size, eos
        try:
            self._tokenizer: LLTokenizer = compiling.make_tokenizer(*arguments)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured_outputs can't be had with this model's tokenizer: {error}"
            ) from error
        self.trials = Trials(*arguments)

    def __call__(self, kind: str, text: str) -> Matcher:
        from jpaged.structured.compiling import compiled

        try:
            if kind not in _HARMLESS and (reason := self.trials.check(kind, text)) is not None:
                raise ValueError(reason)
            return Matcher(compiled(kind, text, self._tokenizer))
        except ValueError as error:
            message = str(error)[:300].strip()
            raise InvalidRequestError(f"structured_outputs.{kind} can't be used: {message}") from error
