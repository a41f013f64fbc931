"""Service: what all handlers share, and a request's way from its fields to the engine's streams."""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from jpaged.async_engine import AsyncLLM
from jpaged.errors import InvalidConfigError, InvalidRequestError
from jpaged.sampling_params import SamplingParams
from jpaged.server.config import ServerConfig
from jpaged.server.durable import Durable
from jpaged.server.errors import ApiError
from jpaged.server.ledger import Entry
from jpaged.server.middleware import OWNER, given_id
from jpaged.server.positions import Position, Positions
from jpaged.server.prompts import Prompts, TokenizedPrompt
from jpaged.server.protocol import Generation, ToTheModel
from jpaged.server.sampling import Sampling, kind_of
from jpaged.server.tickets import Kind, Ticket
from jpaged.streams import Stream

if TYPE_CHECKING:
    from jpaged.server.tracing import Tracing
    from jpaged.tokenization import Tokenizer, TokensPrompt

log = logging.getLogger("jpaged.server")

_COMMON = SamplingParams(top_p=0.9, logprobs=1)
"""What its samplers can do, most requests want. They are compiled when the server starts, and nobody waits for them."""


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
        self.prompts = Prompts(llm.engine, config.max_prompts)
        known = llm.engine.generation_config if config.generation_config == "auto" else {}
        try:
            self.sampling = Sampling(known, config.max_logprobs)
        except InvalidRequestError as error:
            raise InvalidConfigError(f"the model's generation_config: {error} Use generation_config=none.") from error
        for params in (self.sampling.usual, _COMMON):
            llm.prepare(params)
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
                    "readout": prompt.readout,
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
        return await durable.attach(entry, kind_of(body))

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


def owner_of(request: Request) -> str:
    """Whose request it is."""
    return str(request.scope.get(OWNER, ""))


def plain(body: ToTheModel) -> dict[str, Any]:
    """What the client has sent."""
    return body.model_dump(mode="json", by_alias=True, exclude_unset=True)


def new_id(prefix: str, given: str | None) -> str:
    return f"{prefix}-{given or uuid.uuid4().hex}"
