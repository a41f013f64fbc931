"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter

from jpaged.server.errors import ApiError
from jpaged.server.messages import render
from jpaged.server.protocol import DetokenizeRequest, TokenizeRequest
from jpaged.server.service import Service
from jpaged.server.transport import JsonRoute
from jpaged.tokenization import encode_text


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or of a chat."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "send a prompt or messages, and not both.")
        tokens = await service.llm.in_worker(_tokens, service, body)
        answer = {"count": len(tokens), "max_model_len": service.llm.engine.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = service.tokenizer.convert_ids_to_tokens(tokens)
        return answer

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens, special ones included."""
        service.check_model(body.model)
        vocab = service.llm.engine.model_config.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocab:
                raise ApiError(400, f"token id {token} lies outside the vocabulary [0, {vocab}).", param="tokens")
        decode = service.tokenizer.backend_tokenizer.decode
        return {"prompt": await service.llm.in_worker(lambda: decode(body.tokens, skip_special_tokens=False))}

    return router


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return render(service.tokenizer, body.messages, body, with_tools=bool(body.tools)).tokens
    return encode_text(body.prompt or "", service.tokenizer, add_special_tokens=body.add_special_tokens)
