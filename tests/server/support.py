"""A server on a free port of 127.0.0.1, on a thread of its own."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx2 as httpx
import openai

from jpaged.async_engine import AsyncLLM
from jpaged.server.app import make_app
from jpaged.server.config import ServerConfig
from jpaged.server.lifecycle import Server, address_of, bind


class Live:
    """A running server and clients of it."""

    def __init__(self, llm: AsyncLLM, url: str, key: str | None = None) -> None:
        self.llm, self.url = llm, url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, timeout=60, headers=headers)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60)
        self.async_openai = lambda: openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60
        )

    def post(self, path: str, **body):
        return self.http.post(path, json=body)

    def idle(self) -> None:
        """Waits until the engine has nothing left, and checks that no block is held."""
        while self.llm.num_unfinished_requests or self.llm.engine.has_unfinished_requests():
            time.sleep(0.01)
        assert self.llm.engine.blocks.num_used == 0
        self.llm.engine.blocks.check_invariants()

    def metrics(self) -> dict[str, float]:
        """Samples by name, with labels other than the model's."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        found = {}
        for line in lines:
            name, value = line.rsplit(" ", 1)
            name = name.replace('model_name="tiny"', "").replace(",}", "}").replace("{}", "")
            found[name.removeprefix("jpaged:")] = float(value)
        return found


@contextlib.contextmanager
def serving(engine, key: str | None = None, *, drains: bool = True, tracer_provider=None, **settings) -> Iterator[Live]:
    """Serves an engine until the block ends; then it holds no block.

    Args:
      drains: the block's end waits until all requests have finished.
    """
    config = ServerConfig(port=0, served_model_name=("tiny", "another"), disable_log_stats=True, **settings)
    llm = AsyncLLM(
        engine=engine,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        step_timeout=config.step_timeout,
    )
    sock = bind(config)
    app = make_app(llm, config, tracer_provider)
    server = Server(app, llm, config)
    live = Live(llm, address_of(sock, config), key)
    live.durable = app.state.service.durable
    thread = threading.Thread(target=server.run_until_end, args=(sock,))
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield live
        if drains and llm.failure is None:
            live.idle()
    finally:
        live.http.close()
        live.openai.close()
        server.should_exit = True
        thread.join()


def raw_connection(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def raw_post(live: Live, path: str, **body) -> socket.socket:
    """A request of which nothing is read yet."""
    connection, data = raw_connection(live), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection
