"""POST /v1/completions."""

import dataclasses
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jpaged.outputs import CompletionOutput, LogprobsAt, RequestOutput
from jpaged.sampling_params import SamplingParams
from jpaged.sequence import Readout
from jpaged.server.answers import Usage, final_outputs, merged
from jpaged.server.errors import ApiError
from jpaged.server.positions import Position
from jpaged.server.protocol import CompletionRequest
from jpaged.server.renderer import Renderer
from jpaged.server.service import Service
from jpaged.server.tickets import Ticket
from jpaged.server.transport import JsonRoute, event
from jpaged.streams import Stream

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

_DEFAULT_MAX_TOKENS = 16


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await Completions(service, body, service.ticket("cmpl", body, request)).run(request)

    return router


class Completions(Renderer[CompletionRequest]):
    """One request."""

    Body = CompletionRequest

    def __init__(self, service: Service, body: CompletionRequest, ticket: Ticket) -> None:
        super().__init__(service, body, ticket)
        # OpenAI's way to score a text: echo it, and generate nothing.
        self._scores_only = bool(body.echo) and body.max_tokens == 0

    async def _submit(self) -> list[Stream]:
        service, body, ticket = self._service, self._body, self._ticket
        params = self._params()
        prompts = await service.llm.in_worker(service.prompts.tokenize, body.prompt, "prompt")
        check, cut_to = service.prompts.check_length, body.truncate_prompt_tokens
        prompts = [check(prompt, params.max_tokens, cut_to) for prompt in prompts]
        if self._scores_only:
            prompts = [dataclasses.replace(prompt, readout=Readout(generates=False)) for prompt in prompts]
        return await service.submit(body, ticket.id, prompts, params, ticket=ticket)

    def _params(self) -> SamplingParams:
        body = self._body
        if body.suffix:
            raise ApiError(400, "suffix is not supported: these models continue a prompt only.", param="suffix")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens=0 without echo asks for nothing.", param="max_tokens")
        if body.stream and body.echo and body.logprobs is not None:
            raise ApiError(400, "echo with logprobs can't be streamed.", param="stream")
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            body = body.model_copy(update={"prompt_logprobs": body.logprobs})
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        return self._service.sampling.params_of(body, max_tokens=max_tokens, logprobs=body.logprobs)

    # ------------------------------------------------------------------------------------------------- answers

    async def _whole(self, streams: Sequence[Stream]) -> dict[str, Any]:
        usage = Usage()
        choices: list[dict[str, Any]] = []
        for output in await final_outputs(streams):
            usage.add_prompt(output)
            for completion in output.outputs:
                if not self._scores_only:
                    usage.completion += len(completion.token_ids)
                choices.append(self._choice(len(choices), output, completion))
        return {**self._head(), "choices": choices, "usage": usage.as_dict()}

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        body = self._body
        echoed = self._echo(output) if body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            at: list[tuple[int, LogprobsAt | None]] = []
            if body.echo and output.prompt_logprobs is not None:
                at += zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            if not self._scores_only:
                at += zip(completion.token_ids, completion.logprobs or [], strict=True)
            logprobs = _logprobs(at, body.logprobs, self._service.llm.engine.tokenizer)
        choice = {
            "index": index,
            "text": echoed + ("" if self._scores_only else completion.text),
            "logprobs": logprobs,
            "finish_reason": "length" if self._scores_only else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.score is not None:
            choice["score"] = completion.score
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": completion.token_ids}
        return choice

    async def _events(self, streams: Sequence[Stream], have: dict[int, Position]) -> AsyncIterator[bytes]:
        body, head, usage = self._body, self._head(), Usage()
        positions = self._service.positions(have)
        options = body.stream_options
        n, begun = body.n or 1, set()
        async for i, output in merged(streams):
            first = i not in begun
            begun.add(i)
            if first:
                usage.add_prompt(output)
            for completion in output.outputs:
                usage.completion += len(completion.token_ids)
                index = i * n + completion.index
                completion = positions.new(index, completion, completion.text)
                text, finished = completion.text, completion.finished() and output.finished
                if first and body.echo and index not in have:
                    text = self._echo(output) + text
                if not (text or completion.token_ids or finished):
                    continue
                chunk: dict[str, Any] = {
                    "index": index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                if body.logprobs is not None and completion.logprobs:
                    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
                    chunk["logprobs"] = _logprobs(pairs, body.logprobs, self._service.llm.engine.tokenizer)
                if body.return_token_ids:
                    chunk["token_ids"] = completion.token_ids
                extra = {"usage": usage.as_dict()} if options and options.continuous_usage_stats else {}
                yield event({**head, "choices": [chunk], **extra}, positions.event_id)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage.as_dict()})

    def _head(self) -> dict[str, Any]:
        ticket = self._ticket
        return {"id": ticket.id, "object": "text_completion", "created": ticket.created, "model": ticket.model}

    def _echo(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._service.tokenizer.backend_tokenizer.decode(output.prompt_token_ids)


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: for each position, by token id."""
    if output.prompt_logprobs is None:
        return None
    return [
        None if at is None else {str(token): logprob._asdict() for token, logprob in at.items()}
        for at in output.prompt_logprobs
    ]


def _logprobs(
    positions: Iterable[tuple[int, LogprobsAt | None]], count: int, tokenizer: "Tokenizer | None"
) -> dict[str, list[Any]]:
    """OpenAI's columns. The texts are the tokens' own; offsets count their characters."""
    tokens: list[str] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    offset = 0
    for token, at in positions:
        text = at[token].decoded_token if at is not None else tokenizer.decode([token]) if tokenizer else None
        text = f"token_id:{token}" if text is None else str(text)
        tokens.append(text)
        chosen.append(None if at is None else at[token].logprob)
        ranked = [] if at is None else [one for one in at.values() if one.rank is not None and one.rank <= count]
        best = {str(one.decoded_token): one.logprob for one in ranked}
        top.append(None if at is None else {**best, text: at[token].logprob})
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}
