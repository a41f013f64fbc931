import io
import sys

import pytest

from jpaged.cli.main import main
from tests.engine.support import GOLDENS

TINY = ("--model", str(GOLDENS / "models" / "llama"))


@pytest.fixture
def jpaged(capsys, monkeypatch):
    """Runs a command line in this process, on the tiny Llama; returns (exit status, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "", tiny: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main([*arguments, *(TINY if tiny else ())])
        return status, *capsys.readouterr()

    return run
