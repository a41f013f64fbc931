"""A constraint as a llguidance matcher, within llguidance's limits; and a process that does nothing else.

Run as a program, this file tries grammars: it reads JSON lines, the first of which is a tokenizer, and answers each of
the others with a line (see `trials.py`). The process imports nothing of jpaged, and shall be killed when it hangs.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import llguidance

try:
    import resource
except ImportError:  # there are no such limits on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIMITS: dict[str, Any] = {
    "step_max_items": 4_000,
    "max_lexer_states": 50_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
"""What differs from llguidance's own: with its 50,000 Earley items a step of an ambiguous grammar takes seconds, and
the lexer of one grammar may grow to 100 MiB. Some work that compiling does counts towards none of them."""
JSON_OPTIONS = {"whitespace_pattern": r"(\n {0,32}| )"}
"""Between the parts of a JSON text: nothing, a space, or a line break and indentation. Without a bound, a small model
goes on with spaces until it is cut off."""
MAX_MEMORY = 2 << 30
"""Bytes of the process that tries grammars."""
_NICE = 5
"""It gives way to those who answer requests."""


def make_tokenizer(settings: str, vocab_size: int, eos_token_ids: list[int]) -> "LLTokenizer":
    """Of a tokenizers library's JSON. Raises ValueError: llguidance can't read it."""
    return llguidance.LLTokenizer(settings, n_vocab=vocab_size, eos_token=eos_token_ids)


def compiled(kind: str, text: str, tokenizer: "LLTokenizer") -> "LLMatcher":
    """A matcher at the beginning of a grammar, whose first mask is made: it may take the longest, and forks find it.

    Args:
      kind, text: of `StructuredOutputsParams`.

    Raises:
      ValueError: it is no such thing, exceeds the limits, or allows no output.
    """
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(tokenizer, _grammar(kind, text), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error()
        raise ValueError("it allows no output" if "NoExtension" in reason else reason)
    return matcher


def _grammar(kind: str, text: str) -> str:
    """The constraint in llguidance's own form."""
    match kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "regex":
            return f"start: /{llguidance.regex_to_lark(text, use_ascii='d')}/"
    return llguidance.grammar_from(kind, text)  # type: ignore[arg-type]  # "choice", "grammar"


def _try_grammars() -> None:
    """The program: a line `{"kind", "text"}` is answered with `null`, or the reason why it can't be compiled."""
    tokenizer = make_tokenizer(*json.loads(sys.stdin.readline()))
    _answer("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what comes from here on is about grammars, and is told
    for line in sys.stdin:
        trial = json.loads(line)
        _bound_cpu(trial.pop("seconds"))
        try:
            compiled(**trial, tokenizer=tokenizer)
            _answer(None)
        except ValueError as error:
            _answer(str(error))


def _answer(answer: str | None) -> None:
    print(json.dumps(answer), flush=True)


def _bound_memory() -> None:
    if resource is not None:
        os.nice(_NICE)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _bound_cpu(seconds: float) -> None:
    """From now on: who would kill this process may be killed first."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    _bound_memory()
    _try_grammars()
