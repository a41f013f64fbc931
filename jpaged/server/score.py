"""POST /v1/score: log-probabilities of given completions, as `LLM.score` has them."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jpaged.readout import SCORING, logprobs_from, scored, with_completion
from jpaged.server.answers import Usage, final_outputs
from jpaged.server.errors import ApiError
from jpaged.server.prompts import TokenizedPrompt, several
from jpaged.server.protocol import ScoreRequest
from jpaged.server.service import Service, new_id
from jpaged.server.transport import JsonRoute, answer
from jpaged.streams import Stream


def router_of(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How likely the model finds completions: the log-probability of each of their tokens, and the sum."""
        model, name = service.check_model(body.model), new_id("score", body.request_id)
        prompts = await service.llm.in_worker(_pairs, service, body)
        streams = await service.submit(body, name, prompts, SCORING)
        return await answer(service, request, streams, _whole(model, name, prompts, streams))

    return router


def _pairs(service: Service, body: ScoreRequest) -> list[TokenizedPrompt]:
    """Each completion behind its prompt."""
    prompts, completions = service.prompts.tokenize(body.prompts, "prompts"), several(body.completions)
    if not completions or len(completions) > service.config.max_prompts:
        most = service.config.max_prompts
        raise ApiError(400, f"between 1 and {most} completions are scored at once.", param="completions")
    prompts = prompts * len(completions) if len(prompts) == 1 else prompts
    if len(prompts) != len(completions):
        message = f"{len(prompts)} prompts need as many completions, not {len(completions)}."
        raise ApiError(400, message, param="completions")
    pairs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole, start = with_completion(service.llm.engine, {"prompt_token_ids": prompt.tokens}, completion)
        pair = TokenizedPrompt(text=None, tokens=whole["prompt_token_ids"], readout=scored(start))
        pairs.append(service.prompts.check_length(pair))
    return pairs


async def _whole(
    model: str, name: str, prompts: Sequence[TokenizedPrompt], streams: Sequence[Stream]
) -> dict[str, Any]:
    usage, data = Usage(), []
    for index, (prompt, output) in enumerate(zip(prompts, await final_outputs(streams), strict=True)):
        usage.add_prompt(output)
        logprobs = logprobs_from(output, prompt.readout.scored_from)  # type: ignore[union-attr]  # it has one
        data.append({"object": "score", "index": index, "score": sum(logprobs), "token_logprobs": logprobs})
    head = {"id": name, "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": usage.as_dict()}
