"""A server's life: bind, serve, drain, end; and what its exit status says.

0: a signal came and all was drained, or is in a snapshot. 1: the engine died. A second signal stops at once.
"""

import asyncio
import logging
import os
import signal
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from jpaged import logs
from jpaged.async_engine import AsyncLLM
from jpaged.errors import EngineDeadError, InvalidConfigError, SnapshotError
from jpaged.server.config import ServerConfig
from jpaged.server.durable import Durable
from jpaged.server.metrics import Metrics
from jpaged.server.service import Service

log = logging.getLogger("jpaged.server")

_GRACE = 5.0
"""Seconds that clients have to take the errors that end a drain."""
_STATS_EVERY = 10.0


def bind(config: ServerConfig) -> socket.socket:
    """Takes the address before anything is loaded; nobody can connect until the server serves.

    Raises:
      InvalidConfigError: the address is in use, or not ours; or the certificate can't be used.
    """
    if config.ssl_certfile is not None:
        _check_certificate(config.ssl_certfile, config.ssl_keyfile)
    where = config.uds or f"{config.host}:{config.port}"
    try:
        if config.uds is not None:
            path = Path(config.uds)
            if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
                path.unlink()  # of an earlier server
            sock = socket.socket(socket.AF_UNIX)
            before = os.umask(0o177)  # ours alone
            try:
                sock.bind(config.uds)
            finally:
                os.umask(before)
        else:
            family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        raise InvalidConfigError(f"can't listen on {where}: {error.strerror or error}.") from error
    return sock


def _check_certificate(certfile: str, keyfile: str | None) -> None:
    try:
        # With a password, because OpenSSL would ask the terminal for that of an encrypted key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:
        raise InvalidConfigError(
            f"can't use ssl_certfile={certfile!r} with ssl_keyfile={keyfile!r}: {error.strerror or error}. Both are "
            "PEM files, and the key has no password."
        ) from error


def address_of(sock: socket.socket, config: ServerConfig) -> str:
    """Where clients find it."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = sock.getsockname()[:2]
    return f"{'https' if config.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with our way to end."""

    def __init__(self, app: FastAPI, llm: AsyncLLM, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                http="httptools",
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
                timeout_graceful_shutdown=int(config.shutdown_timeout + _GRACE) + 1,
            )
        )
        self._llm, self._settings = llm, config
        self._metrics: Metrics = app.state.metrics
        self._service: Service = app.state.service
        self._durable: Durable | None = self._service.durable
        llm.on_death = self._take_death
        self.on_ready: Callable[[], None] = lambda: None
        """Called when connections are taken."""

    def run_until_end(self, sock: socket.socket) -> int:
        """Serves until a signal comes or the engine dies; returns the exit status."""
        self.run([sock])
        if self._settings.uds is not None:
            Path(self._settings.uds).unlink(missing_ok=True)
        return 0 if self._llm.failure is None else 1

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        stats = None if self._settings.disable_log_stats else asyncio.create_task(self._log_stats())
        try:
            await super().serve(sockets)
        finally:
            if stats is not None:
                stats.cancel()
            if not self.force_exit:
                await self._end()

    async def _end(self) -> None:
        try:
            if self._durable is not None:
                await self._durable.suspend()
        except (EngineDeadError, SnapshotError) as error:  # the journal has what is needed
            log.error("no snapshot: %s", error)
        await self._llm.shutdown()
        if self._durable is not None:
            await self._durable.close()
        if self._service.tracing is not None:
            await asyncio.to_thread(self._service.tracing.close)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._durable is not None:
            await self._durable.start()
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once."""
        name = signal.Signals(sig).name
        if self.should_exit:
            log.warning("%s: stopping at once", name)
            logs.flush()
            os._exit(128 + sig)
        log.warning("%s: no new requests; those in flight have %g s", name, self._settings.shutdown_timeout)
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._loop.call_later, self._settings.shutdown_timeout, self._end_drain)

    def _end_drain(self) -> None:
        count = self._llm.num_unfinished_requests
        log.warning("%s %d requests", "aborting" if self._durable is None else "suspending", count)
        ending = self._llm.abort_all() if self._durable is None else self._durable.suspend()
        self._ending = self._loop.create_task(ending)

    def _take_death(self, _: EngineDeadError) -> None:
        if self._durable is not None:
            self._durable.died()
        self.should_exit = True  # requests get their errors meanwhile

    async def _log_stats(self) -> None:
        before = self._metrics.totals
        while True:
            await asyncio.sleep(_STATS_EVERY)
            scheduler, blocks = self._llm.engine.scheduler, self._llm.engine.blocks
            if self._metrics.totals != before or scheduler.has_work:
                rates = self._metrics.rates()
                log.info(
                    "prompt %.0f tokens/s (%.0f %% cached), generation %.0f tokens/s; "
                    "%d running, %d waiting, %d swapped; "
                    "KV cache %.1f %%; %d preemptions, %d tokens lost by them",
                    rates.prompt,
                    100 * rates.cached / rates.prompt if rates.prompt else 0.0,
                    rates.generated,
                    len(scheduler.running),
                    scheduler.num_waiting,
                    scheduler.num_swapped,
                    100 * blocks.num_used / blocks.allocator.num_usable,
                    scheduler.num_preemptions,
                    scheduler.tokens_lost,
                )
            before = self._metrics.totals


def plan_of(llm: AsyncLLM, config: ServerConfig) -> list[str]:
    """What the server is going to do, in lines for whoever started it."""
    engine: Any = llm.engine
    spec, scheduler, swap = engine.runner.spec, engine.scheduler, engine.scheduler.swap_space
    usable = engine.blocks.allocator.num_usable
    return [
        f"model {engine.config.model}: context {engine.max_model_len} tokens, "
        f"{engine.blocks.tables.shape[0]} sequences at once, {scheduler.max_num_batched_tokens} tokens a step",
        f"KV cache: {usable} blocks of {engine.config.block_size} tokens ({usable * engine.config.block_size} tokens), "
        f"{spec.num_bytes / 2**20:.0f} MiB; swap space: {swap.capacity} blocks",
        f"{len(scheduler.buckets)} step shapes; queue: {config.max_num_queued_reqs} requests, "
        f"{config.max_num_queued_tokens} tokens",
    ]
