"""What requests say about sampling and about the form of their outputs, as `SamplingParams`."""

from collections.abc import Mapping
from typing import Any

from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.server.errors import ApiError
from jpaged.server.protocol import Generation
from jpaged.structured.params import StructuredOutputsParams

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config may say about sampling."""
_SAME_NAME = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens"),
    *("prompt_logprobs", "allowed_token_ids", "skip_special_tokens", "include_stop_str_in_output"),
    *("use_beam_search", "length_penalty", "early_stopping"),
)
"""Fields of a request that are fields of `SamplingParams`."""


class Sampling:
    """Reads it.

    Args:
      generation_config: the model's: what a request does not say is as there; empty: as OpenAI has it.
      max_logprobs: most log-probabilities of a position.

    Raises:
      InvalidRequestError: the model's generation_config says what can't be done.
    """

    def __init__(self, generation_config: Mapping[str, Any], max_logprobs: int) -> None:
        known = {name: generation_config[name] for name in _DEFAULTS if generation_config.get(name) is not None}
        if generation_config.get("do_sample") is False:
            known["temperature"] = 0.0
        self._defaults, self._max_logprobs = known, max_logprobs
        self.usual = SamplingParams(**known)
        """Of a request that says nothing."""

    def params_of(
        self,
        request: Generation,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        structure: StructuredOutputsParams | None = None,
    ) -> SamplingParams:
        """What a request says about sampling; what it does not say is the model's default.

        Raises:
          ApiError, InvalidRequestError, UnsupportedFeatureError: it can't be served as asked.
        """
        given = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
        if request.use_beam_search:
            given.setdefault("temperature", 0.0)
        else:
            given = {**self._defaults, **given}
        if request.logit_bias is not None:
            try:
                given["logit_bias"] = {int(token): value for token, value in request.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias must map token ids to numbers.", param="logit_bias") from None
        for name, wanted in (("logprobs", logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if wanted is not None and wanted > self._max_logprobs:
                message = f"{name}={wanted} is above this server's limit of {self._max_logprobs}."
                raise ApiError(400, message, param=name)
        if request.stream and (given.get("best_of") or 1) > (given.get("n") or 1) and not request.use_beam_search:
            raise ApiError(400, "best_of above n can't be streamed: the best are known at the end.", param="best_of")
        given["structured_outputs"] = structure or structure_of(request)
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, output_kind=kind_of(request))


def kind_of(request: Generation) -> RequestOutputKind:
    """What its streams shall tell."""
    return RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY


def structure_of(request: Generation) -> StructuredOutputsParams | None:
    """The form that a request wants its output to have.

    Raises:
      ApiError, InvalidRequestError: it is none, or two are given.
    """
    wanted, form = request.structured_outputs, request.response_format
    if form is None or form.type == "text":
        return (
            None if wanted is None else StructuredOutputsParams(**wanted.model_dump(exclude_none=True, by_alias=True))
        )
    if wanted is not None:
        raise ApiError(400, "response_format and structured_outputs exclude each other.", param="response_format")
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.json_schema is None:
        raise ApiError(400, "response_format 'json_schema' needs a json_schema.", param="response_format")
    return StructuredOutputsParams(json=form.json_schema.json_schema)
