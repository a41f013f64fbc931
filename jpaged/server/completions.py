"""POST /v1/completions."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jpaged.outputs import CompletionOutput, LogprobsAt, RequestOutput
from jpaged.sampling_params import SamplingParams
from jpaged.server.errors import ApiError
from jpaged.server.protocol import CompletionRequest
from jpaged.server.service import Service, TokenizedPrompt, Usage, final_outputs, merged, new_id
from jpaged.server.transport import JsonRoute, answer, event, stream_events
from jpaged.streams import Stream

if TYPE_CHECKING:
    from jpaged.tokenization import Tokenizer

_DEFAULT_MAX_TOKENS = 16


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await Completions(service, body).run(request)

    return router


class Completions:
    """One request."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._service, self._body = service, body
        self._model = service.check_model(body.model)
        self._id = new_id("cmpl", body.request_id)
        self._created = int(time.time())
        # OpenAI's way to score a text: echo it, and generate nothing.
        self._scores_only = bool(body.echo) and body.max_tokens == 0

    async def run(self, request: Request) -> Response:
        service, body = self._service, self._body
        params = self._params()
        prompts = await service.llm.in_worker(service.tokenize, body.prompt, "prompt")
        prompts = [service.check_length(prompt, params.max_tokens, body.truncate_prompt_tokens) for prompt in prompts]
        streams = await service.submit(body, self._id, prompts, params)
        if body.stream:
            return stream_events(service, streams, self._events(streams, prompts))
        return await answer(service, request, streams, self._whole(streams, prompts))

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
        return self._service.sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs)

    # ------------------------------------------------------------------------------------------------- answers

    async def _whole(self, streams: Sequence[Stream], prompts: Sequence[TokenizedPrompt]) -> dict[str, Any]:
        usage = Usage()
        choices: list[dict[str, Any]] = []
        for prompt, output in zip(prompts, await final_outputs(streams), strict=True):
            usage.add_prompt(output)
            for completion in output.outputs:
                if not self._scores_only:
                    usage.completion += len(completion.token_ids)
                choices.append(self._choice(len(choices), prompt, output, completion))
        return {**self._head(), "choices": choices, "usage": usage.as_dict()}

    def _choice(
        self, index: int, prompt: TokenizedPrompt, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        body = self._body
        echoed = self._echo(prompt) if body.echo else ""
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

    async def _events(self, streams: Sequence[Stream], prompts: Sequence[TokenizedPrompt]) -> AsyncIterator[bytes]:
        body, head, usage = self._body, self._head(), Usage()
        options = body.stream_options
        n, begun = body.n or 1, set()
        async for i, output in merged(streams):
            first = i not in begun
            begun.add(i)
            if first:
                usage.add_prompt(output)
            for completion in output.outputs:
                text, finished = completion.text, completion.finished() and output.finished
                if first and body.echo:
                    text = self._echo(prompts[i]) + text
                if not (text or completion.token_ids or finished):
                    continue
                usage.completion += len(completion.token_ids)
                chunk: dict[str, Any] = {
                    "index": i * n + completion.index,
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
                yield event({**head, "choices": [chunk], **extra})
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage.as_dict()})

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _echo(self, prompt: TokenizedPrompt) -> str:
        return (
            prompt.text if prompt.text is not None else self._service.tokenizer.backend_tokenizer.decode(prompt.tokens)
        )


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
