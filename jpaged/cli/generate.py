"""jpaged generate: prompts in, answers out, as they are generated."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro import conf

from jpaged.cli.flags import NOT_FLAGS, Switch, build, flags_of
from jpaged.cli.form import FormFlags
from jpaged.cli.memory import MemoryPicture, check_replay_path, memory_picture
from jpaged.cli.session import CompileReport, compile_decode_steps, open_engine
from jpaged.cli.status import Status
from jpaged.config import EngineConfig
from jpaged.errors import InvalidRequestError
from jpaged.progress import Progress
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.tokenization import Prompt

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine
    from jpaged.outputs import RequestOutput

_ROWS = (1, 4, 8, 16, 32, 64)
"""Sizes of the batch that are chosen from: each is compiled separately, and kept in the cache."""

EngineFlags = flags_of(
    EngineConfig,
    "GenerateEngine",
    defaults={"warmup": False},
    helps={"max_num_seqs": "Most sequences running at once; None: as many as there are prompts, up to 64."},
)
SamplingFlags = flags_of(
    SamplingParams,
    "GenerateSampling",
    leave_out=NOT_FLAGS,
    defaults={"temperature": 0.0, "max_tokens": 256},
    helps={"max_tokens": "Most tokens to generate."},
)
Prompts = Annotated[conf.Positional[tuple[str, ...]], conf.arg(metavar="[PROMPT ...]", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer prompts: arguments, or the lines of standard input.

    A prompt is a question to the model; with --raw, text to be continued.

    Greedy unless --temperature says otherwise.
    """

    prompt: Prompts = ()
    """Each argument is one prompt; without any, each line of standard input. One prompt: the answer is
    written as it is generated. Several: "> prompt" and its answer, in order."""
    raw: Switch = False
    """Continue the prompt as plain text, without the model's chat template."""
    system: str | None = None
    """A system message in front of every prompt."""
    json: Switch = False
    """Write one JSON object a prompt, each on a line of its own."""
    show_memory: Switch = False
    """Draw the KV cache's blocks while it runs, coloured by the prompt that holds them (on a terminal)."""
    memory_replay: Annotated[Path | None, conf.arg(metavar="FILE.html")] = None
    """Write a page that replays the KV cache step by step in a browser."""
    engine: EngineFlags = dataclasses.field(default_factory=EngineFlags)  # type: ignore[valid-type]
    """The engine's arguments."""
    sampling: SamplingFlags = dataclasses.field(default_factory=SamplingFlags)  # type: ignore[valid-type]
    """How tokens are chosen."""
    form: FormFlags = dataclasses.field(default_factory=FormFlags)
    """The form of the answers."""

    def run(self) -> int:
        prompts = list(self.prompt) or _prompts_from_stdin()
        if self.raw and self.system is not None:
            raise InvalidRequestError("--system is part of the chat template, which --raw leaves out.")
        check_replay_path(self.memory_replay)
        kind = RequestOutputKind.FINAL_ONLY if self.json else RequestOutputKind.DELTA
        params = build(SamplingParams, self.sampling, output_kind=kind, structured_outputs=self.form.params())
        wanted: Any = self.engine
        rows = wanted.max_num_seqs
        if rows is None:
            rows = next((r for r in _ROWS if r >= len(prompts) * params.n), _ROWS[-1])
        config = build(EngineConfig, wanted, max_num_seqs=rows)
        status = Status()
        engine, report = open_engine(config, status)
        for i, prompt in enumerate(prompts):
            try:
                engine.add_request(str(i), self._as_chat(prompt, engine), params)
            except InvalidRequestError as error:
                which = f"prompt {i + 1}: " if len(prompts) > 1 else ""
                raise InvalidRequestError(f"{which}{error}") from error
        if len(prompts) * params.n > 1:
            compile_decode_steps(engine, params)
        writer = _JsonWriter(prompts) if self.json else _TextWriter(prompts, params.n)
        with memory_picture(engine, status, show=self.show_memory, replay=self.memory_replay) as picture:
            _answer(engine, writer, status, report, picture)
        return 0

    def _as_chat(self, prompt: str, engine: "LLMEngine") -> Prompt:
        if self.raw or engine.tokenizer is None or not engine.tokenizer.chat_template:
            return prompt
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]


def _prompts_from_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise InvalidRequestError(
            'no prompt: give it as an argument (jpaged generate "What is JAX?"), pipe '
            "lines into standard input, or talk to the model with jpaged chat."
        )
    prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InvalidRequestError("no prompt: standard input has no lines.")
    return prompts


def _answer(
    engine: "LLMEngine",
    writer: "_TextWriter | _JsonWriter",
    status: Status,
    report: CompileReport,
    picture: MemoryPicture | None,
) -> None:
    """Runs the engine until all is written."""
    progress = None
    with contextlib.ExitStack() as stack:
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if outputs and progress is None:
                report.settle()
                status.muted = True  # from here on a report would come in between the answers
                # On a terminal the answers themselves are the progress.
                hidden = sys.stdout.isatty() or (picture is not None and picture.on_terminal) or None
                progress = stack.enter_context(Progress("generating", writer.num_prompts, disable=hidden))
            if picture is not None:
                picture.after_step(draw=progress is not None)
            for output in outputs:
                writer.take(output)
                if progress is not None and output.finished:
                    progress.advance()


class _TextWriter:
    """Answers in the order of their prompts; the first unfinished one is written as it grows.

    Several samples of one prompt are written when all have finished, numbered.
    """

    def __init__(self, prompts: list[str], n: int) -> None:
        self._prompts, self.num_prompts = prompts, len(prompts)
        self._several = len(prompts) > 1
        self._texts = [[""] * n for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self._current = 0
        self._written: int | None = None  # characters of the current prompt's answer; None: nothing, not even it

    def take(self, output: "RequestOutput") -> None:
        at = int(output.request_id)
        for one in output.outputs:
            self._texts[at][one.index] += one.text
        if output.finished:
            self._reasons[at] = output.outputs[0].finish_reason
        while self._current < len(self._prompts):
            self._write_current()
            if self._reasons[self._current] is None:
                break
            self._next()

    def _write_current(self) -> None:
        texts = self._texts[self._current]
        if self._written is None:
            if self._several:
                print("> " + self._prompts[self._current].replace("\n", "\n> "))
            self._written = 0
        if len(texts) == 1:
            print(texts[0][self._written :], end="", flush=True)
            self._written = len(texts[0])
        elif self._reasons[self._current] is not None:
            print("\n".join(f"[{i + 1}] {text}" for i, text in enumerate(texts)), end="")

    def _next(self) -> None:
        print("\n" if self._several and self._current + 1 < len(self._prompts) else "", flush=True)
        if not self._several and self._reasons[0] == "length":
            print("[the answer was cut off: see --max-tokens]", file=sys.stderr)
        self._current, self._written = self._current + 1, None


class _JsonWriter:
    """One object a prompt, in their order, with the names of `RequestOutput` and of the API's usage."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts, self.num_prompts = prompts, len(prompts)
        self._waiting: dict[int, RequestOutput] = {}
        self._next = 0

    def take(self, output: "RequestOutput") -> None:
        if output.finished:
            self._waiting[int(output.request_id)] = output
        while self._next in self._waiting:
            print(json.dumps(self._object(self._waiting.pop(self._next)), ensure_ascii=False), flush=True)
            self._next += 1

    def _object(self, output: "RequestOutput") -> dict[str, Any]:
        prompt_tokens, metrics = len(output.prompt_token_ids), output.metrics
        generated = sum(len(o.token_ids) for o in output.outputs)
        ended = metrics.arrival_time if metrics.finished_time is None else metrics.finished_time
        return {
            "prompt": self._prompts[self._next],
            "outputs": [_sample(o) for o in output.outputs],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": prompt_tokens + generated,
                "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
            },
            "time_to_first_token": metrics.time_to_first_token,
            "e2e_latency": ended - metrics.arrival_time,
        }


def _sample(one: Any) -> dict[str, Any]:
    fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    if one.logprobs is None:
        del fields["logprobs"], fields["cumulative_logprob"]
    else:
        fields["logprobs"] = [{token: entry._asdict() for token, entry in at.items()} for at in one.logprobs]
    return fields
