"""jpaged run-batch: a file of requests in, a file of results out."""

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro import conf

from jpaged.cli.bench.report import check_counts
from jpaged.cli.flags import build, flags_of
from jpaged.cli.session import open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import InvalidConfigError
from jpaged.progress import Progress
from jpaged.server.config import ServerConfig

if TYPE_CHECKING:
    import httpx2 as httpx

    from jpaged.server.batch import Counts, ResultFile

EngineFlags = flags_of(EngineConfig, "BatchEngine", defaults={"warmup": False})
_SERVING = (
    *("served_model_name", "chat_template", "generation_config", "enable_auto_tool_choice", "tool_call_parser"),
    *("max_prompts", "max_logprobs", "max_body_bytes"),
)
"""Settings of a server that answers depend on."""
ServerFlags = flags_of(
    ServerConfig, "BatchServer", leave_out={field.name for field in dataclasses.fields(ServerConfig)} - {*_SERVING}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBatch:
    """Answer the requests of an OpenAI batch file.

    A line is {"custom_id": "a", "url": "/v1/chat/completions", "body": {...}}; its result is a line of the other file.

    What has a result is skipped: after a crash or Ctrl-C, the same command goes on.
    """

    input_file: Annotated[Path, conf.arg(aliases=("-i",))]
    """The requests, .jsonl; urls are /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/score."""
    output_file: Annotated[Path, conf.arg(aliases=("-o",))]
    """The results; added to what is there."""
    max_concurrency: int | None = None
    """Most requests under way; None: twice what the batch holds, or 64 of another server."""
    base_url: str | None = None
    """Send the requests to this server, which runs already, instead of a model loaded here."""
    server: ServerFlags = dataclasses.field(default_factory=ServerFlags)  # type: ignore[valid-type]
    """How requests are answered."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""

    def run(self) -> int:
        check_counts(max_concurrency=1 if self.max_concurrency is None else self.max_concurrency)
        try:
            with self.input_file.open("rb") as file:
                total = sum(1 for line in file if line.strip())
        except OSError as error:
            raise InvalidConfigError(f"{self.input_file}: {error.strerror}.") from error
        from jpaged.server.batch import ResultFile

        status = Status()
        with ResultFile(self.output_file) as results:
            work = self._elsewhere(results, total) if self.base_url else self._here(results, total, status)
            counts = asyncio.run(work)
        status.line(f"{counts.done} done, {counts.failed} of them errors; {counts.skipped} had a result already")
        return 0

    async def _elsewhere(self, results: "ResultFile", total: int) -> "Counts":
        import httpx2 as httpx

        headers = _authorization(os.environ.get("OPENAI_API_KEY"))
        limits, patience = httpx.Limits(max_connections=None), httpx.Timeout(None, connect=60.0)
        async with httpx.AsyncClient(
            base_url=self.base_url or "", headers=headers, limits=limits, timeout=patience
        ) as client:
            return await self._run(client, results, total, self.max_concurrency or 64)

    async def _here(self, results: "ResultFile", total: int, status: Status) -> "Counts":
        """Through the server's own application, without a socket: the same checks, answers and errors."""
        import httpx2 as httpx

        from jpaged.async_engine import AsyncLLM
        from jpaged.server.app import api_keys, make_app

        config = build(ServerConfig, self.server)
        engine, _ = open_engine(build(EngineConfig, self.engine), status)
        status.muted = True
        llm = AsyncLLM(engine=engine)
        try:
            transport = httpx.ASGITransport(make_app(llm, config))
            headers = _authorization(next(iter(api_keys(config)), None))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://batch", headers=headers, timeout=None
            ) as client:
                rows = len(engine.scheduler.batch.by_row)
                return await self._run(client, results, total, self.max_concurrency or 2 * rows)
        finally:
            await llm.shutdown()

    async def _run(
        self, client: "httpx.AsyncClient", results: "ResultFile", total: int, max_concurrency: int
    ) -> "Counts":
        from jpaged.server.batch import run_batch

        with Progress("requests", total=total) as progress:
            return await run_batch(
                client, self.input_file, results, max_concurrency=max_concurrency, on_line=progress.advance
            )


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
