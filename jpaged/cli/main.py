"""The entry point: `jpaged VERB ...`. A verb is a dataclass: its fields are the flags, `run` does the work."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol

import tyro
from tyro import conf

import jpaged
from checkpoints.errors import CheckpointError
from jpaged.cli.bench import Bench
from jpaged.cli.chat import Chat
from jpaged.cli.collect_env import CollectEnv
from jpaged.cli.generate import Generate
from jpaged.errors import InvalidConfigError, InvalidRequestError, JpagedError, UnsupportedFeatureError


class Verb(Protocol):
    def run(self) -> int:
        """Does it; returns the exit status."""
        ...


VERBS = (
    Annotated[Generate, conf.subcommand("generate")]
    | Annotated[Chat, conf.subcommand("chat")]
    | Annotated[Bench, conf.subcommand("bench")]
    | Annotated[CollectEnv, conf.subcommand("collect-env")]
)
STYLE = (conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.UseAppendAction, conf.DisallowNone,
         conf.HelptextFromCommentsOff)
DESCRIPTION = """PagedAttention and continuous batching in pure JAX.

Begin with: jpaged generate "What is the capital of France?"
"""
_USAGE_ERRORS = (InvalidConfigError, InvalidRequestError, UnsupportedFeatureError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name; None: the process's own) and returns the exit status.

    2: the command line or a prompt is wrong. 1: a model can't be loaded, or the engine failed. 130: Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        print(f"jpaged {jpaged.__version__}")
        return 0
    verb: Verb = tyro.cli(VERBS, prog="jpaged", description=DESCRIPTION,  # type: ignore[call-overload]
                          args=arguments or ["--help"], config=STYLE)
    try:
        return verb.run()
    except (JpagedError, CheckpointError) as error:
        print(f"jpaged: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, _USAGE_ERRORS) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jpaged generate ... | head`: whoever read has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is silent too
        return 0


if __name__ == "__main__":
    sys.exit(main())
