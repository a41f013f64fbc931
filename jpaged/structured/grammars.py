"""Grammars: what requests ask for, compiled by llguidance for one tokenizer.

Schemas and expressions come from strangers. Three bounds keep a hostile one to itself: the sizes that
`StructuredOutputsParams` checks, llguidance's own limits on the work of compiling and of each step, and the time after
which compiling, the first mask included, is given up.
"""

import collections
import concurrent.futures
import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jpaged.errors import InvalidRequestError
from jpaged.structured.matching import Matcher
from jpaged.structured.params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from jpaged.tokenization import Tokenizer

COMPILE_SECONDS = 10.0
"""A grammar that takes longer is refused."""
MAX_COMPILED = 128
"""Compiled grammars that are kept."""
MAX_COMPILING = 4
"""Threads that compile at once, those included that were given up and still run."""
LIMITS: dict[str, Any] = {"step_max_items": 4_000, "max_lexer_states": 100_000, "verbose_errors": False}
"""What differs from llguidance's own. Its 50,000 Earley items let a step of an ambiguous grammar take seconds."""
JSON_OPTIONS = {"whitespace_pattern": r"(\n {0,32}| )"}
"""Between the parts of a JSON text: nothing, a space, or a line break and indentation. Without a bound, a small model
goes on with spaces until it is cut off."""


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
        self._tokenizer: LLTokenizer | None = None
        self._compiled: collections.OrderedDict[tuple[str, str], Matcher] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_COMPILING)

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A matcher at the beginning of the grammar.

        Raises:
          InvalidRequestError: it can't be compiled, not within the limits, or allows no output.
        """
        key = params.kind, params.text
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key].fork()
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            tokenizer = self._tokenizer
        compiled = Matcher(self._within_time(lambda: self._compile(params, tokenizer)))
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return compiled.fork()

    def _make_tokenizer(self) -> "LLTokenizer":
        import llguidance

        backend = self._hf_tokenizer.backend_tokenizer
        settings = json.loads(backend.to_str())
        settings["padding"] = settings["truncation"] = None
        size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
        try:
            return llguidance.LLTokenizer(json.dumps(settings), n_vocab=size, eos_token=self._eos)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured_outputs can't be had with this model's tokenizer: {error}"
            ) from error

    @staticmethod
    def _compile(params: StructuredOutputsParams, tokenizer: "LLTokenizer") -> "LLMatcher":
        import llguidance

        try:
            grammar = _grammar(params)
        except ValueError as error:
            raise _refused(params, str(error)) from error
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first step may be the longest; forks find it done
        if matcher.is_error():
            raise _refused(params, matcher.get_error())
        return matcher

    def _within_time(self, work: Callable[[], Any]) -> Any:
        """Runs in a thread of its own: one that hangs can't be ended, but it can be left alone."""
        if not self._slots.acquire(timeout=COMPILE_SECONDS):
            raise InvalidRequestError("too many structured_outputs are being compiled; try again later.")
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._slots.release()

        threading.Thread(target=run, name="jpaged-grammar", daemon=True).start()
        try:
            return future.result(COMPILE_SECONDS)
        except TimeoutError:
            raise InvalidRequestError(
                f"structured_outputs took longer than {COMPILE_SECONDS:g} s to compile: make it simpler."
            ) from None


def _grammar(params: StructuredOutputsParams) -> str:
    """The constraint in llguidance's own form."""
    import llguidance

    match params.kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(params.text, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "regex":
            return f"start: /{llguidance.regex_to_lark(params.text, use_ascii='d')}/"
    return llguidance.grammar_from(params.kind, params.text)  # type: ignore[arg-type]  # "choice", "grammar"


def _refused(params: StructuredOutputsParams, reason: str) -> InvalidRequestError:
    if "NoExtension" in reason:
        reason = "it allows no output"
    return InvalidRequestError(f"structured_outputs.{params.kind} can't be used: {reason[:300].strip()}")
