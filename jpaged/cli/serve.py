"""jpaged serve: an OpenAI-compatible HTTP server."""

import dataclasses
import gc
import logging
import os
import sys
from typing import Annotated

from tyro import conf

from jpaged import logs
from jpaged.cli.flags import build, flags_of
from jpaged.cli.session import open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.server.config import ServerConfig

_YOUNG_OBJECTS = 10_000
"""After so many new objects Python looks for garbage among them; each time, JAX does so, too."""

EngineFlags = flags_of(EngineConfig, "ServeEngine", leave_out=("model",))
ServerFlags = flags_of(ServerConfig, "ServeServer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP, for OpenAI's clients.

    Listens on 127.0.0.1:8000 unless told otherwise. Ctrl-C or SIGTERM finishes what is in flight; a second one stops.
    """

    model: Annotated[conf.Positional[str], conf.arg(metavar="MODEL")] = EngineConfig.model
    """A short name (smollm2-135m), a .gguf file, a Hugging Face folder, or a hub id."""
    server: ServerFlags = dataclasses.field(default_factory=ServerFlags)  # type: ignore[valid-type]
    """The server's settings."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""

    def run(self) -> int:
        config = build(ServerConfig, self.server)
        engine_config = build(EngineConfig, self.engine, model=self.model)
        logs.to_stream(sys.stderr, config.log_format)
        from jpaged.server.lifecycle import Server, address_of, bind, plan_of

        sock = bind(config)
        status = Status()
        status.muted = config.log_format == "json"
        engine, _ = open_engine(engine_config, status)
        logging.getLogger("jpaged").setLevel(logging.INFO)

        from jpaged.async_engine import AsyncLLM
        from jpaged.server.app import api_keys, make_app

        llm = AsyncLLM(
            engine=engine,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
            step_timeout=config.step_timeout,
            slow_step=config.slow_step,
        )
        server = Server(make_app(llm, config), llm, config)
        say = logging.getLogger("jpaged").info if config.log_format == "json" else status.line
        for line in plan_of(llm, config):
            say(line)
        if not config.uds and config.host not in ("127.0.0.1", "::1", "localhost") and not api_keys(config):
            say("warning: other machines can connect, and there is no API key")
        where = address_of(sock, config)
        server.on_ready = lambda: say(f"jpaged is ready on {where}")
        status.muted = True  # what is compiled from here on is no news
        _calm_garbage_collection()
        exit_status = server.run_until_end(sock)
        if exit_status:  # a thread may be stuck on the device: waiting for it would never end
            logs.flush()
            sys.stderr.flush()
            os._exit(exit_status)
        return exit_status


def _calm_garbage_collection() -> None:
    """What is loaded stays: looking through all of it holds every thread for a quarter of a second, again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
