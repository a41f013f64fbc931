"""Service: what all handlers share, and a request's way from its fields to the engine's streams."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from jpaged.async_engine import AsyncLLM
from jpaged.errors import InvalidConfigError, InvalidRequestError
from jpaged.outputs import RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence import Pooling
from jpaged.server.config import ServerConfig
from jpaged.server.durable import Durable
from jpaged.server.errors import ApiError
from jpaged.server.ledger import Entry
from jpaged.server.middleware import OWNER, given_id
from jpaged.server.positions import Position, Positions
from jpaged.server.protocol import Generation, ToTheModel
from jpaged.server.tickets import Kind, Ticket
from jpaged.streams import Stream
from jpaged.structured.params import StructuredOutputsParams
from jpaged.tokenization import Prompt, encode_prompt

if TYPE_CHECKING:
    from jpaged.server.tracing import Tracing
    from jpaged.tokenization import Tokenizer, TokensPrompt

log = logging.getLogger("jpaged.server")

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config may say about sampling."""
_SAME_NAME = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens"),
    *("prompt_logprobs", "allowed_token_ids", "skip_special_tokens", "include_stop_str_in_output"),
    *("use_beam_search", "length_penalty", "early_stopping"),
)
"""Fields of a request that are fields of `SamplingParams`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt on its way to the engine."""

    text: str | None
    tokens: list[int]
    scored_from: int = 0
    """With prompt_logprobs: the first token that gets them."""


class Service:
    """What the handlers work with.

    Args:
      llm: the engine.
      config: the server's settings.

    Raises:
      InvalidConfigError: the model's generation_config or the chat template can't be used.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self.durable = None if config.snapshot_dir is None else Durable(llm, config)
        self.names = config.served_model_name or (llm.engine.config.model,)
        self.created = int(time.time())
        self.tracing: Tracing | None = None
        self.in_flight = 0
        """Requests that have been accepted and not been answered to the end."""
        self.defaults: dict[str, Any] = {}
        if config.generation_config == "auto":
            known = llm.engine.generation_config
            self.defaults = {name: known[name] for name in _DEFAULTS if known.get(name) is not None}
            if known.get("do_sample") is False:
                self.defaults["temperature"] = 0.0
            try:
                llm.prepare(SamplingParams(**self.defaults))  # most requests will be like that
            except InvalidRequestError as error:
                raise InvalidConfigError(
                    f"the model's generation_config: {error} Use generation_config=none."
                ) from error
        if config.chat_template is not None:
            if llm.engine.tokenizer is None:
                raise InvalidConfigError("chat_template needs a model with a tokenizer.")
            try:
                llm.engine.tokenizer.chat_template = Path(config.chat_template).read_text()
            except OSError as error:
                raise InvalidConfigError(f"chat_template: {error}") from error

    @property
    def tokenizer(self) -> "Tokenizer":
        if self.llm.engine.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: only prompts of token ids can be served.")
        return self.llm.engine.tokenizer

    def check_model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
          ApiError: 404, no such model.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"the model {name!r} does not exist; here is {known}.", param="model", code="model_not_found"
            )
        return name

    # ------------------------------------------------------------------------------------- prompts and parameters

    def tokenize(self, prompts: Any, param: str) -> list[TokenizedPrompt]:
        """The prompts of a request, one or several, as text or token ids. Not for the event loop.

        Args:
          prompts: `protocol.Prompts`.
          param: the field that they are.

        Raises:
          ApiError, InvalidRequestError: they are none, too many, or can't be tokenised.
        """
        many = several(prompts)
        if not many:
            raise ApiError(400, f"{param} is an empty list.", param=param)
        if len(many) > self.config.max_prompts:
            raise ApiError(400, f"{len(many)} are too many; at most {self.config.max_prompts}.", param=param)
        tokenized = []
        for one in many:
            prompt: Prompt = one if isinstance(one, str) else {"prompt_token_ids": one}
            text, tokens, _ = encode_prompt(prompt, self.llm.engine.tokenizer)
            tokenized.append(TokenizedPrompt(text=text, tokens=tokens))
        return tokenized

    def sampling_params(
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
            given = {**self.defaults, **given}
        if request.logit_bias is not None:
            try:
                given["logit_bias"] = {int(token): value for token, value in request.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias must map token ids to numbers.", param="logit_bias") from None
        for name, wanted in (("logprobs", logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if wanted is not None and wanted > self.config.max_logprobs:
                message = f"{name}={wanted} is above this server's limit of {self.config.max_logprobs}."
                raise ApiError(400, message, param=name)
        if request.stream and (given.get("best_of") or 1) > (given.get("n") or 1) and not request.use_beam_search:
            raise ApiError(400, "best_of above n can't be streamed: the best are known at the end.", param="best_of")
        given["structured_outputs"] = structure or structure_of(request)
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, output_kind=_kind_of(request))

    def check_length(
        self, prompt: TokenizedPrompt, max_tokens: int | None = None, truncate_to: int | None = None
    ) -> TokenizedPrompt:
        """Cuts the prompt to its last tokens if that was asked for.

        Raises:
          ApiError: 400, prompt and max_tokens together are longer than the context.
        """
        tokens, most = prompt.tokens, self.llm.engine.max_model_len
        if truncate_to is not None and len(tokens) > truncate_to:
            prompt = TokenizedPrompt(text=None, tokens=tokens[-truncate_to:])
        if len(prompt.tokens) + (max_tokens or 1) > most:
            raise ApiError(
                400,
                f"this model's maximum context length is {most} tokens; the prompt has {len(prompt.tokens)} and "
                f"{max_tokens or 1} more were asked for. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        return prompt

    # -------------------------------------------------------------------------------------------------- running

    def ticket(self, kind: Kind, body: ToTheModel, request: Request) -> Ticket:
        """The name under which a request runs. With a snapshot_dir its X-Request-Id counts, too."""
        name = body.request_id or (None if self.durable is None else given_id(request.headers))
        return Ticket(
            id=new_id(kind, name),
            kind=kind,
            model=self.check_model(body.model),
            created=int(time.time()),
            owner=owner_of(request),
            named=name is not None,
        )

    def known(self, ticket: Ticket, body: ToTheModel) -> Entry | None:
        """See `Durable.known`."""
        return None if self.durable is None else self.durable.known(ticket, plain(body))

    async def submit(
        self,
        request: ToTheModel,
        request_id: str,
        prompts: Sequence[TokenizedPrompt],
        params: SamplingParams,
        pooling: Pooling | None = None,
        ticket: Ticket | None = None,
    ) -> list[Stream]:
        """Queues a request's prompts; all or none of them.

        Args:
          ticket: of a request that outlives the server, if there is a snapshot_dir.
        """
        names = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        entry = None
        if self.durable is not None and ticket is not None:
            entry = self.durable.open(ticket, plain(request), names)
        streams: list[Stream] = []
        try:
            for name, prompt in zip(names, prompts, strict=True):
                tokens: TokensPrompt = {"prompt_token_ids": prompt.tokens, "cache_salt": request.cache_salt or ""}
                if prompt.text is not None:
                    tokens["prompt"] = prompt.text
                options: dict[str, Any] = {
                    "priority": request.priority,
                    "scored_from": prompt.scored_from,
                    "pooling": pooling,
                    "keep": entry is not None,
                }
                with self._traced(name, params):
                    streams.append(await self.llm.submit(tokens, params, name, **options))
            if self.durable is not None and entry is not None:
                await self.durable.accepted(entry, streams)
        except BaseException:
            for stream in streams:
                stream.close()
            if self.durable is not None and entry is not None:
                self.durable.forget(entry)
            raise
        if self.config.enable_log_requests:
            lengths = [len(prompt.tokens) for prompt in prompts]
            log.info(
                "request %s: %s prompt tokens, n=%d, max_tokens=%s", request_id, lengths, params.n, params.max_tokens
            )
        return streams

    async def attach(self, entry: Entry, body: Generation) -> list[Stream]:
        """Readers of a request that was accepted before, from its beginning."""
        durable: Durable = self.durable  # type: ignore[assignment]  # it knows the entry
        return await durable.attach(entry, _kind_of(body))

    def positions(self, have: dict[int, Position]) -> Positions:
        """For a stream to a client that has so much of it."""
        return Positions(have, named=self.durable is not None)

    def end(self, streams: Sequence[Stream]) -> None:
        """The client has its answer, or has gone: its requests end, unless they are kept for it."""
        for stream in streams:
            stream.close()
        if self.durable is not None:
            self.durable.left([stream.request_id for stream in streams])

    @contextlib.contextmanager
    def _traced(self, request_id: str, params: SamplingParams) -> Iterator[None]:
        """Tells the tracing, if there is one, of a request that is taken."""
        begun = None if self.tracing is None else self.tracing.begin(request_id, params)
        try:
            yield
        except BaseException:
            if self.tracing is not None and begun is not None:
                self.tracing.forget(request_id, begun)
            raise


def _kind_of(request: Generation) -> RequestOutputKind:
    return RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY


def owner_of(request: Request) -> str:
    """Whose request it is."""
    return str(request.scope.get(OWNER, ""))


def plain(body: ToTheModel) -> dict[str, Any]:
    """What the client has sent."""
    return body.model_dump(mode="json", by_alias=True, exclude_unset=True)


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


def several(prompts: Any) -> list[Any]:
    """`protocol.Prompts` as a list of them."""
    return [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts


def new_id(prefix: str, given: str | None) -> str:
    return f"{prefix}-{given or uuid.uuid4().hex}"


async def final_outputs(streams: Sequence[Stream]) -> list[RequestOutput]:
    """The last output of each stream.

    Raises:
      ApiError: 503, the request was aborted from outside (the server shuts down, or an operator did it).
    """
    finals = []
    for stream in streams:
        [output] = [output async for output in stream]  # FINAL_ONLY
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            raise ApiError(503, "the request was aborted by the server.", code="aborted")
        finals.append(output)
    return finals


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(index of the stream, output) as they come."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                output = task.result()
                yield i, output
                if not output.finished:
                    waiting[asyncio.ensure_future(anext(streams[i]))] = i
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@dataclasses.dataclass
class Usage:
    """Tokens of a request, over all its prompts and samples."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
