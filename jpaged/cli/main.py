"""The entry point: `jpaged COMMAND ...`. A command is a dataclass: its fields are flags, `run` does it."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tyro
from tyro import conf

import jpaged
from checkpoints.errors import CheckpointError
from jpaged.cli.bench import Bench
from jpaged.cli.bench.latency import Latency
from jpaged.cli.bench.serve import BenchServe
from jpaged.cli.bench.startup import Startup
from jpaged.cli.bench.throughput import Throughput
from jpaged.cli.chat import Chat
from jpaged.cli.collect_env import CollectEnv
from jpaged.cli.convert import Convert
from jpaged.cli.flags import named
from jpaged.cli.generate import Generate
from jpaged.cli.run_batch import RunBatch
from jpaged.cli.serve import Serve
from jpaged.cli.top import Top
from jpaged.errors import InvalidConfigError, InvalidRequestError, JpagedError, UnsupportedFeatureError


class Command(Protocol):
    def run(self) -> int:
        """Does it; returns the exit status."""
        ...


COMMANDS: dict[tuple[str, ...], type[Command]] = {
    ("generate",): Generate,
    ("chat",): Chat,
    ("serve",): Serve,
    ("top",): Top,
    ("bench", "serve"): BenchServe,
    ("bench", "throughput"): Throughput,
    ("bench", "latency"): Latency,
    ("bench", "startup"): Startup,
    ("run-batch",): RunBatch,
    ("convert",): Convert,
    ("collect-env",): CollectEnv,
}
CHOICE: Any = (
    named(Generate, "generate")
    | named(Chat, "chat")
    | named(Serve, "serve")
    | named(Top, "top")
    | named(Bench, "bench")
    | named(RunBatch, "run-batch")
    | named(Convert, "convert")
    | named(CollectEnv, "collect-env")
)
DESCRIPTION = """PagedAttention and continuous batching in pure JAX.

Begin with: jpaged generate "What is the capital of France?"
"""
STYLE = (conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.UseAppendAction, conf.DisallowNone)
_USAGE_ERRORS = (InvalidConfigError, InvalidRequestError, UnsupportedFeatureError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name; None: the process's own) and returns the exit status.

    2: the command line or a prompt is wrong. 1: a model can't be loaded, or the engine failed. 130: Ctrl-C.
    """
    try:
        with _deadly_interrupts():
            return _run(sys.argv[1:] if arguments is None else list(arguments))
    except (JpagedError, CheckpointError) as error:
        print(f"jpaged: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, _USAGE_ERRORS) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jpaged generate ... | head`: whoever read has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit is silent too
        return 0


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"jpaged {jpaged.__version__}")
        return 0
    for words, command in COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            rest = arguments[len(words) :]
            return tyro.cli(command, prog=" ".join(("jpaged", *words)), args=rest, config=STYLE).run()
    # None of them: tyro shows the help, or what is wrong and what there is.
    arguments = arguments or ["--help"]
    return tyro.cli(CHOICE, prog="jpaged", description=DESCRIPTION, args=arguments, config=STYLE).run()


@contextlib.contextmanager
def _deadly_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once, as it does most programs.

    Python would only hear of it when XLA has compiled, and an interrupted import may go on as if nothing had been.
    `jpaged chat`, which has something to keep, takes it over.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
