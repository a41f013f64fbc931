"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jpaged.outputs import CompletionOutput, Logprob, LogprobsAt
from jpaged.sampling_params import SamplingParams
from jpaged.server.answers import Usage, final_outputs
from jpaged.server.completions import prompt_logprobs
from jpaged.server.errors import ApiError
from jpaged.server.messages import render
from jpaged.server.positions import Position, Positions
from jpaged.server.protocol import ChatRequest, NamedTool
from jpaged.server.renderer import Renderer
from jpaged.server.sampling import structure_of
from jpaged.server.service import Service
from jpaged.server.tickets import Ticket
from jpaged.server.tools import FORMATS, REQUIRED, CallParser, Format, named, schema_of_call, schema_of_calls
from jpaged.server.transport import JsonRoute, event
from jpaged.streams import Stream
from jpaged.structured.params import StructuredOutputsParams

MAX_FORCED_CALLS = 8
"""Most calls of an answer with tool_choice "required"."""


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers chats."""
        return await ChatCompletion(service, body, service.ticket("chatcmpl", body, request)).run(request)

    return router


class ChatCompletion(Renderer[ChatRequest]):
    """One request."""

    Body = ChatRequest

    def __init__(self, service: Service, body: ChatRequest, ticket: Ticket) -> None:
        super().__init__(service, body, ticket)
        self._structure: StructuredOutputsParams | None = None
        self._format = self._decide_on_tools()

    async def _submit(self) -> list[Stream]:
        service, body, ticket = self._service, self._body, self._ticket
        params = self._params()
        tokenizer = service.tokenizer
        prompt = await service.llm.in_worker(
            lambda: render(tokenizer, body.messages, body, with_tools=self._format is not None)
        )
        prompt = service.prompts.check_length(prompt, params.max_tokens, body.truncate_prompt_tokens)
        return await service.submit(body, ticket.id, [prompt], params, ticket=ticket)

    def _params(self) -> SamplingParams:
        body = self._body
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if max_tokens == 0:
            raise ApiError(400, "max_tokens=0 asks for nothing.", param="max_tokens")
        if self._format is not None and self._format.special_tokens:
            body = body.model_copy(update={"skip_special_tokens": False})
        return self._service.sampling.params_of(
            body,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            structure=self._structure,
        )

    def _decide_on_tools(self) -> Format | None:
        """How calls will be written; None: the model is not told of any tools."""
        body, choice = self._body, self._body.tool_choice
        if not body.tools:
            if choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice needs tools.", param="tool_choice")
            return None
        if choice == "none":
            return None
        functions = {tool.function.name: tool.function.model_dump() for tool in body.tools}
        if choice in (None, "auto"):
            parser = self._service.config.tool_call_parser
            if not self._service.config.enable_auto_tool_choice or parser is None:
                message = '"auto" tool choice needs a server with --enable-auto-tool-choice and --tool-call-parser.'
                raise ApiError(400, message, param="tool_choice", code="unsupported")
            return FORMATS[parser]
        if structure_of(body) is not None:
            raise ApiError(400, "a forced tool_choice and a response_format exclude each other.", param="tool_choice")
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in functions:
                raise ApiError(400, f"tool_choice: there is no tool {name!r}.", param="tool_choice")
            self._structure = StructuredOutputsParams(json=schema_of_call(functions[name]))
            return named(name)
        most = 1 if body.parallel_tool_calls is False else MAX_FORCED_CALLS
        self._structure = StructuredOutputsParams(json=schema_of_calls(functions.values(), most))
        return REQUIRED

    def _parser(self) -> CallParser | None:
        return None if self._format is None else CallParser(self._format)

    # ------------------------------------------------------------------------------------------------- answers

    async def _whole(self, streams: Sequence[Stream]) -> dict[str, Any]:
        body, usage = self._body, Usage()
        [output] = await final_outputs(streams)
        usage.add_prompt(output)
        usage.completion = sum(len(completion.token_ids) for completion in output.outputs)
        whole = {
            **self._head("chat.completion"),
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": usage.as_dict(),
        }
        if body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(output)
        if body.return_token_ids:
            whole["prompt_token_ids"] = output.prompt_token_ids
        return whole

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason, parser = completion.finish_reason, self._parser()
        if parser is not None:
            text = parser.push(completion.text)
            rest, calls = parser.finish()
            message["content"] = text + rest
            if calls := self._allowed(calls):
                message["content"] = text or None
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                reason = "tool_calls"
        choice = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.score is not None:
            choice["score"] = completion.score
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    async def _events(self, streams: Sequence[Stream], have: dict[int, Position]) -> AsyncIterator[bytes]:
        usage, head, options = Usage(), self._head("chat.completion.chunk"), self._body.stream_options
        positions = self._service.positions(have)
        parsers: dict[int, CallParser | None] = {}
        closed: set[int] = set()
        async for output in streams[0]:
            if not parsers:
                usage.add_prompt(output)
                for completion in output.outputs:
                    parsers[completion.index] = self._parser()
                    yield event({**head, "choices": [_chunk(completion.index, {"role": "assistant", "content": ""})]})
            for completion in output.outputs:
                if completion.index in closed:
                    continue
                usage.completion += len(completion.token_ids)
                extra = {"usage": usage.as_dict()} if options and options.continuous_usage_stats else {}
                for choice in self._chunks(completion, parsers[completion.index], positions):
                    yield event({**head, "choices": [choice], **extra}, positions.event_id)
                if completion.finished():
                    closed.add(completion.index)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage.as_dict()})

    def _chunks(
        self, completion: CompletionOutput, parser: CallParser | None, positions: Positions
    ) -> Iterator[dict[str, Any]]:
        """What a sequence's new text and its end give rise to, and the client does not have."""
        text, reason = completion.text, completion.finish_reason
        calls: list[dict[str, Any]] = []
        if parser is not None:
            text = parser.push(text)
            if reason is not None:
                rest, calls = parser.finish()
                text, calls = text + rest, self._allowed(calls)
                reason = "tool_calls" if calls else reason
        completion = positions.new(completion.index, completion, text)
        logprobs = self._logprobs(completion) if completion.token_ids else None
        if completion.text or logprobs:
            chunk = _chunk(completion.index, {"content": completion.text}, logprobs)
            if self._body.return_token_ids:
                chunk["token_ids"] = completion.token_ids
            yield chunk
        if calls and positions.take_calls(completion.index):
            yield _chunk(completion.index, {"tool_calls": calls})
        if reason is not None:
            end = _chunk(completion.index, {})
            yield {**end, "finish_reason": reason, "stop_reason": completion.stop_reason}

    def _allowed(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return calls[:1] if self._body.parallel_tool_calls is False else calls

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        count = self._body.top_logprobs or 0
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return {"content": [_token_logprobs(token, at, count) for token, at in pairs], "refusal": None}

    def _head(self, kind: str) -> dict[str, Any]:
        ticket = self._ticket
        return {"id": ticket.id, "object": kind, "created": ticket.created, "model": ticket.model}


def _chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _token_logprobs(token: int, at: LogprobsAt, count: int) -> dict[str, Any]:
    ranked = [(t, one) for t, one in at.items() if one.rank is not None and one.rank <= count]
    ranked.sort(key=lambda pair: pair[1].rank or 0)
    return {**_one(token, at[token]), "top_logprobs": [_one(t, one) for t, one in ranked]}


def _one(token: int, logprob: Logprob) -> dict[str, Any]:
    text = f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token
    return {"token": text, "logprob": logprob.logprob, "bytes": list(text.encode())}
