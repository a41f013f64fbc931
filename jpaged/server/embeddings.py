"""POST /v1/embeddings: pooled hidden states."""

import base64
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from jpaged.readout import EMBEDDING, embedding_of, pooled
from jpaged.server.answers import Usage, final_outputs
from jpaged.server.errors import ApiError
from jpaged.server.protocol import EmbeddingRequest
from jpaged.server.service import Service, new_id
from jpaged.server.transport import JsonRoute, answer
from jpaged.streams import Stream


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """The hidden states of texts after the last norm, pooled to one each."""
        model, name = service.check_model(body.model), new_id("embd", body.request_id)
        size = service.llm.engine.model_config.hidden_size
        if body.dimensions not in (None, size):
            message = f"this model's embeddings have {size} dimensions, and can't be cut to {body.dimensions}."
            raise ApiError(400, message, param="dimensions", code="unsupported")
        prompts = await service.llm.in_worker(service.prompts.tokenize, body.input, "input")
        prompts = [service.prompts.check_length(prompt, truncate_to=body.truncate_prompt_tokens) for prompt in prompts]
        prompts = [dataclasses.replace(prompt, readout=pooled(body.pooling)) for prompt in prompts]
        streams = await service.submit(body, name, prompts, EMBEDDING)
        return await answer(service, request, streams, _whole(body, model, name, streams))

    return router


async def _whole(body: EmbeddingRequest, model: str, name: str, streams: Sequence[Stream]) -> dict[str, Any]:
    usage, data = Usage(), []
    for index, output in enumerate(await final_outputs(streams)):
        usage.add_prompt(output)
        embedding = _encoded(embedding_of(output, body.normalize), body.encoding_format)
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    head = {"id": name, "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": usage.as_dict()}


def _encoded(embedding: np.ndarray, encoding_format: str) -> list[float] | str:
    """Numbers, or the base64 of little-endian float32, which is what OpenAI's clients ask for."""
    if encoding_format == "float":
        return embedding.tolist()
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
