"""SamplingParams: how one request's tokens are chosen. Names and defaults are vLLM's (docs: NAMES)."""

import dataclasses
import enum
import math
import numbers
from collections.abc import Iterable
from typing import Literal

from jpaged.errors import InvalidRequestError
from jpaged.structured.params import StructuredOutputsParams

# Upper bounds. Device arrays have these widths, so they are limits of the engine and not only of taste.
MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 64
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_STRING = 1024
MAX_TOKENS = 1 << 24


class RequestOutputKind(enum.Enum):
    """What `LLMEngine.step` returns for a running request."""

    CUMULATIVE = 0
    """All text and tokens so far, at every step."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """One output, when the request has finished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Penalties act on raw logits, then the bias and the masks, then temperature, then top-k, min-p and top-p.
    Log-probabilities are of the model's raw distribution, before all of these.

    Raises:
      InvalidRequestError: a field is not of its type, not finite, or out of its bounds.
    """

    n: int = 1
    """Independent samples per prompt. Sample i of a request draws with sequence index i."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output already has; [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output; [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; (0, 2]."""
    temperature: float = 1.0
    """0 is greedy; [0, 2]."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p; (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and -1 keep all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one; [0, 1]."""
    seed: int | None = None
    """Makes the request reproducible whatever else runs. None: taken from the engine's seed."""
    stop: str | list[str] | tuple[str, ...] = ()
    """Strings that end the generation; looked for across and inside tokens."""
    stop_token_ids: list[int] | tuple[int, ...] = ()
    """Tokens that end the generation, besides the model's end-of-sequence tokens."""
    bad_words: list[str] | tuple[str, ...] = ()
    """Words that are never generated (as token sequences, with and without a leading space)."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the model's context."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before so many tokens."""
    logprobs: int | None = None
    """Log-probabilities of the chosen and of the k most likely tokens at each position; 0 to 20."""
    prompt_logprobs: int | None = None
    """The same for each prompt position but the first; 0 to 20."""
    detokenize: bool = True
    """Whether outputs carry text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What `LLMEngine.step` returns while the request runs."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of tokens; values are clamped to [-100, 100]."""
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    """If given, no other token is ever generated."""
    best_of: int | None = None
    """Sequences that are generated, of which the n most likely (by cumulative log-probability) are returned; of a beam
    search, the number of beams. None: n."""
    use_beam_search: bool = False
    """Search for the most likely outputs instead of sampling (paper, section 5.2); needs temperature 0."""
    length_penalty: float = 1.0
    """Of a beam search: hypotheses are ranked by log-probability / length ** length_penalty; [-5, 5]."""
    early_stopping: bool | Literal["never"] = False
    """Of a beam search, when as many hypotheses as beams have ended. True: stop. False: stop when no running beam is
    likely to become better. "never": when none can."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form that the output must have: a JSON schema, a regular expression, choices, a grammar. It comes before all
    else: where min_tokens, bad_words or allowed_token_ids leave it no token, they give way for that token."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        flags = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output", "use_beam_search")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        self._check_group()
        self._check_structured()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated: samples, or beams."""
        return self.best_of or self.n

    @property
    def ranks_samples(self) -> bool:
        """Whether more samples are drawn than returned."""
        return self.num_sequences > self.n and not self.use_beam_search

    @property
    def needs_rules(self) -> bool:
        """Whether logits are edited token by token (bias, masks, bad words, min_tokens)."""
        return bool(self.logit_bias or self.bad_words or self.allowed_token_ids is not None or self.min_tokens)

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def _check_numbers(self) -> None:
        self._integer("n", 1, MAX_N)
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._real("repetition_penalty", 0.0, 2.0, above=True)
        self._real("temperature", 0.0, 2.0)
        self._real("top_p", 0.0, 1.0, above=True)
        self._real("min_p", 0.0, 1.0)
        self._real("length_penalty", -5.0, 5.0)
        self._integer("top_k", -1, 1 << 30)
        self._integer("min_tokens", 0, MAX_TOKENS)
        for name, low, high in (
            ("seed", -(1 << 63), (1 << 64) - 1),
            ("max_tokens", 1, MAX_TOKENS),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("best_of", 1, MAX_N),
        ):
            if getattr(self, name) is not None:
                self._integer(name, low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}.")

    def _check_group(self) -> None:
        if self.num_sequences < self.n:
            raise InvalidRequestError(f"best_of={self.best_of} is below n={self.n}: there is nothing to choose from.")
        if self.ranks_samples and self.greedy:
            raise InvalidRequestError("best_of above n draws samples, and at temperature 0 they would all be the same.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequestError(f'early_stopping must be True, False or "never", not {self.early_stopping!r}.')
        if not self.use_beam_search:
            if self.early_stopping is not False or self.length_penalty != 1.0:
                raise InvalidRequestError("early_stopping and length_penalty need use_beam_search=True.")
        elif not self.greedy:
            raise InvalidRequestError("use_beam_search does not draw: it needs temperature=0.")

    def _check_structured(self) -> None:
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise InvalidRequestError(
                f"structured_outputs must be a StructuredOutputsParams, not {type(self.structured_outputs).__name__}."
            )
        if self.ignore_eos:
            raise InvalidRequestError("structured_outputs end with an end-of-sequence token: ignore_eos must be False.")

    def _check_lists(self) -> None:
        self._strings("stop", MAX_STOP_STRINGS)
        self._strings("bad_words", MAX_BAD_WORDS)
        self._token_ids("stop_token_ids", MAX_STOP_TOKEN_IDS)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids instead.")
        if self.allowed_token_ids is not None:
            self._token_ids("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS)
            if not self.allowed_token_ids:
                raise InvalidRequestError(
                    "allowed_token_ids is empty: no token could be generated. Use None to allow all."
                )
        if self.logit_bias is not None:
            bias = self.logit_bias
            if not isinstance(bias, dict) or len(bias) > MAX_LOGIT_BIAS:
                raise InvalidRequestError(f"logit_bias must be a dict of at most {MAX_LOGIT_BIAS} entries.")
            if not all(_is_integer(t) and t >= 0 for t in bias) or not all(_is_finite(v) for v in bias.values()):
                raise InvalidRequestError("logit_bias must map token ids to finite numbers.")
            self._set("logit_bias", {int(t): min(100.0, max(-100.0, float(v))) for t, v in bias.items()})
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidRequestError(f"output_kind must be a RequestOutputKind, not {self.output_kind!r}.")

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)  # __post_init__ of a frozen dataclass: normalising its own field

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or not low <= value <= high:
            raise InvalidRequestError(f"{name} must be an integer in [{low}, {high}], not {value!r}.")
        self._set(name, int(value))

    def _real(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not _is_finite(value) or not low <= value <= high or (above and value == low):
            raise InvalidRequestError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], not {value!r}.")
        self._set(name, float(value))

    def _strings(self, name: str, most: int) -> None:
        value = getattr(self, name)
        value = (value,) if isinstance(value, str) else () if value is None else value
        if not isinstance(value, Iterable):
            raise InvalidRequestError(f"{name} must be a string or a list of strings, not {value!r}.")
        value = tuple(value)
        if len(value) > most or not all(_is_text(s) and len(s) <= MAX_STRING for s in value):
            raise InvalidRequestError(
                f"{name} takes at most {most} non-empty strings of at most {MAX_STRING} characters."
            )
        self._set(name, value)

    def _token_ids(self, name: str, most: int) -> None:
        value = getattr(self, name)
        value = () if value is None else value
        if not isinstance(value, Iterable):
            raise InvalidRequestError(f"{name} must be a list of token ids, not {value!r}.")
        value = tuple(value)
        if len(value) > most or not all(_is_integer(t) and t >= 0 for t in value):
            raise InvalidRequestError(f"{name} takes at most {most} token ids (integers >= 0).")
        self._set(name, tuple(int(t) for t in value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What `LLM.beam_search` is asked for; names are vLLM's."""

    beam_width: int
    """Beams, and outputs."""
    max_tokens: int
    """Most tokens to generate."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    temperature: float = 0.0
    """Only 0: nothing is drawn, and the log-probabilities are the model's own."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by log-probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """See `SamplingParams.early_stopping`."""
    include_stop_str_in_output: bool = False
    """Keep the text of the token that ended an output."""

    def as_sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError as `SamplingParams` does."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_text(value) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
