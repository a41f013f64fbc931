"""From streams to answers: their last outputs, or all as they come; and what to count."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jpaged.outputs import RequestOutput
from jpaged.server.errors import ApiError
from jpaged.streams import Stream


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
