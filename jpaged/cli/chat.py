"""jpaged chat: a conversation in the terminal, or over a pipe: a line in, an answer out."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jpaged.cli.flags import NOT_FLAGS, Switch, build, flags_of
from jpaged.cli.session import CompileReport, open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import InvalidRequestError
from jpaged.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.outputs import RequestOutput

# One conversation is one sequence: a batch of one row, and so few and small programs to compile.
EngineFlags = flags_of(
    EngineConfig, "ChatEngine", leave_out=("max_num_seqs", "scheduling_policy"), defaults={"warmup": False}
)
SamplingFlags = flags_of(
    SamplingParams,
    "ChatSampling",
    leave_out=(*NOT_FLAGS, "n", "logprobs"),
    defaults={"temperature": 0.0, "max_tokens": 512},
    helps={"max_tokens": "Most tokens of an answer."},
)
HELP = """/help           this list
/reset          forget the conversation
/system [TEXT]  show the system message, or set it
/exit           leave (also Ctrl-D)
Ctrl-C          stop the answer that is being written"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model. It remembers the conversation until /reset.

    Over a pipe, every line of standard input is a message.

    Greedy unless --temperature says otherwise.
    """

    system: str | None = None
    """The system message; None: the model's own."""
    stats: Switch = False
    """After each answer, write its token counts, cached tokens and speed to standard error."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""
    sampling: SamplingFlags = dataclasses.field(default_factory=SamplingFlags)  # type: ignore[valid-type]
    """How tokens are chosen."""

    def run(self) -> int:
        params = build(SamplingParams, self.sampling, output_kind=RequestOutputKind.DELTA)
        config = build(EngineConfig, self.engine, max_num_seqs=1)
        status = Status()
        engine, report = open_engine(config, status)
        if engine.tokenizer is None or not engine.tokenizer.chat_template:
            raise InvalidRequestError(f"{config.model} has no chat template; use jpaged generate --raw.")
        conversation = Conversation(engine, params, status, report, system=self.system, stats=self.stats)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C does not end the process
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{config.model} is ready. /help for help, Ctrl-D to leave.", file=sys.stderr)
        for line in _typed_lines() if interactive else (line.rstrip("\r\n") for line in sys.stdin):
            if line.strip() in ("/exit", "/quit"):
                break
            conversation.take(line)
        return 0


class Conversation:
    """The messages so far, and what a line does to them.

    Every turn sends the whole conversation; the prefix cache keeps the engine from computing it again.
    """

    def __init__(
        self,
        engine: "LLMEngine",
        params: SamplingParams,
        status: Status,
        report: CompileReport,
        *,
        system: str | None = None,
        stats: bool = False,
    ) -> None:
        self._engine, self._params, self._status, self._report = engine, params, status, report
        self._stats = stats
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._turns = 0

    def take(self, line: str) -> None:
        """A message to the model, or a command."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            self._messages = []
            print("The conversation is forgotten.", file=sys.stderr)
        elif command == "/system":
            self._system = rest.strip() or self._system
            print(f"System message: {self._system or '(the model has its own)'}", file=sys.stderr)
        elif command.startswith("/"):
            print(f"No command {command}; /help lists them.", file=sys.stderr)
        else:
            self._say(line)

    def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._turns += 1
        try:
            self._engine.add_request(str(self._turns), [*system, *self._messages], self._params)
        except InvalidRequestError as error:
            self._messages.pop()
            print(f"{error} (/reset forgets the conversation)", file=sys.stderr)
            return
        answer = self._stream(str(self._turns))
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()  # stopped before its first word: as if not asked

    def _stream(self, request_id: str) -> str:
        """Writes the answer as it comes; Ctrl-C ends it early. Returns its text."""
        pieces: list[str] = []
        num_tokens = 0
        with _first_interrupt() as interrupted:
            while self._engine.has_unfinished_requests():
                if interrupted:
                    self._engine.abort(request_id)
                for output in self._engine.step():
                    if output.request_id != request_id:
                        continue
                    if not self._status.muted:
                        self._report.settle()
                        self._status.muted = True
                    pieces.append(output.outputs[0].text)
                    num_tokens += len(output.outputs[0].token_ids)
                    print(pieces[-1], end="", flush=True)
                    last = output
        self._status.muted = False
        reason = last.outputs[0].finish_reason
        print(
            {"length": " [cut off: see --max-tokens]", "abort": " [stopped]"}.get(reason or "", "")
            if self._status.on_terminal
            else "",
            flush=True,
        )
        if self._stats:
            self._status.line(_stats(last, num_tokens))
        return "".join(pieces)


def _stats(output: "RequestOutput", num_tokens: int) -> str:
    metrics = output.metrics
    text = (
        f"[{len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached; "
        f"{num_tokens} generated"
    )
    if metrics.first_token_time is not None and metrics.finished_time is not None:
        text += f"; first after {metrics.first_token_time - metrics.arrival_time:.2f} s"
        if num_tokens > 1:
            rate = (num_tokens - 1) / max(metrics.finished_time - metrics.first_token_time, 1e-9)
            text += f", then {rate:.1f} tokens/s"
    return text + "]"


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing and history, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is imported

    last_interrupt = 0.0
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            now = time.monotonic()
            print()
            if now - last_interrupt < 1:
                return
            last_interrupt = now
            print("Ctrl-D or /exit to leave", file=sys.stderr)


@contextlib.contextmanager
def _first_interrupt() -> Iterator[list[bool]]:
    """A list that becomes true at the first Ctrl-C; the second raises KeyboardInterrupt as usual.

    A step is never broken off in its middle, where it would leave the engine's books unbalanced.
    """
    interrupted: list[bool] = []

    def take(*_: object) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, take)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
