import io
import socket
import sys

import pytest

from jpaged.cli.main import main
from tests.engine.support import GOLDENS
from tests.server.support import serving

TINY = ("--model", str(GOLDENS / "models" / "llama"))


@pytest.fixture
def jpaged(capsys, monkeypatch):
    """Runs a command line in this process, on the tiny Llama; returns (exit status, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "", tiny: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main([*arguments, *(TINY if tiny else ())])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def unused_port() -> int:
    """Where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def live(tiny):
    """A server over the tiny Llama."""
    with serving(tiny(enable_prefix_caching=False)) as server:
        yield server
