"""What is logged: what happened, by numbers, and never a text; and nobody waits for it."""

import io
import json
import logging
import threading

import pytest

from jpaged import LLMEngine, SamplingParams, logs
from tests.engine.support import run

SECRET = "the words that nobody may read"


@pytest.fixture
def heard():
    """The records of jpaged's loggers."""
    records: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record):
            records.append(record)

    log, ear = logging.getLogger("jpaged"), Ear()
    before = log.level
    log.addHandler(ear)
    log.setLevel(logging.DEBUG)
    yield records
    log.removeHandler(ear)
    log.setLevel(before)


def events(records, name):
    return [record.fields for record in records if record.getMessage() == name]


def crowd(engine: LLMEngine, n: int) -> None:
    """More than the pool has room for."""
    for i in range(6):
        params = SamplingParams(n=n, max_tokens=40, ignore_eos=True, seed=i)
        engine.add_request(f"name {i}", {"prompt_token_ids": list(range(3 + i, 23 + i))}, params)
    run(engine, check=False)


def test_every_preemption_says_what_was_lost(tiny, heard):
    engine = tiny(num_blocks=40, enable_prefix_caching=False)
    crowd(engine, n=1)
    told = events(heard, "preemption")
    assert len(told) == engine.scheduler.num_preemptions > 0
    assert sum(fields["tokens_lost"] for fields in told) == engine.scheduler.tokens_lost > 0
    assert {fields["how"] for fields in told} == {"recompute"}
    assert all(fields["request_id"].startswith("name ") for fields in told)


def test_every_swap_says_how_much_and_how_long(tiny, heard):
    engine = tiny(num_blocks=60, enable_prefix_caching=False, swap_blocks=200, preemption_mode="swap")
    swapper = engine.runner.swapper
    before = [(t.blocks, t.bytes, t.seconds) for t in (swapper.out, swapper.back)]
    crowd(engine, n=2)
    for name, traffic, (blocks, size, seconds) in zip(
        ("swap_out", "swap_in"), (swapper.out, swapper.back), before, strict=True
    ):
        told = events(heard, name)
        assert len(told) > 0
        assert sum(fields["blocks"] for fields in told) == traffic.blocks - blocks
        assert sum(fields["bytes"] for fields in told) == traffic.bytes - size
        assert sum(fields["seconds"] for fields in told) == pytest.approx(traffic.seconds - seconds, abs=1e-4)
    assert {fields["how"] for fields in events(heard, "preemption")} == {"swap"}


def test_no_text_is_ever_logged(tiny, heard):
    engine = tiny(num_blocks=40, enable_prefix_caching=False)
    for i in range(4):
        engine.add_request(str(i), SECRET, SamplingParams(max_tokens=30, ignore_eos=True, seed=i))
    outputs = run(engine, check=False)
    assert engine.scheduler.num_preemptions > 0
    lines = [form.format(record) for record in heard for form in (logs.JsonLines(), logs.TextLines())]
    assert lines
    for text in (SECRET, SECRET[:12], *(output.outputs[0].text for output in outputs.values())):
        assert not any(text in line for line in lines)


def record_of(message: str, **more) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "jpaged", "levelname": "INFO", "levelno": 20, "msg": message, **more})


def test_json_lines_are_json_whatever_is_in_them():
    hostile = 'a"\n{"event": "forged"}\u2028\ud800'
    line = logs.JsonLines().format(record_of("preemption", fields={"request_id": hostile, "tokens_lost": 3}))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["request_id"], told["tokens_lost"], told["level"]) == ("preemption", hostile, 3, "info")
    assert json.loads(logs.JsonLines().format(record_of("%s is ready", args=("it",))))["message"] == "it is ready"
    try:
        raise ValueError(hostile)
    except ValueError as error:
        line = logs.JsonLines().format(record_of("engine_dead", exc_info=(ValueError, error, error.__traceback__)))
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["traceback"]


def test_text_lines_are_lines_whatever_is_in_them():
    fields = {"request_id": "a b\n2026 forged", "seconds": 0.123456, "n": 3, "empty": ""}
    line = logs.TextLines().format(record_of("swap_out", fields=fields))
    assert line.endswith('jpaged INFO: swap_out request_id="a b\\n2026 forged" seconds=0.1235 n=3 empty=""')


class Stuck(io.StringIO):
    """A stream that blocks until it is let go: a terminal that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.reached = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.go_on.wait()
        return super().write(text)


def test_whoever_logs_does_not_wait_for_the_stream():
    """With a stream that takes nothing, every line is handed over or dropped at once; later it is said how many."""
    stream = Stuck()
    handler = logs.Handoff(stream, logs.JsonLines())
    handler.handle(record_of("first"))
    stream.reached.wait()
    for i in range(logs.MOST + 7):
        handler.handle(record_of(str(i)))
    stream.go_on.set()
    while not stream.getvalue().endswith(f'"message": "{logs.MOST - 1}"}}\n'):
        pass
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in told if "message" in line] == ["first", *map(str, range(logs.MOST))]
    assert [line["count"] for line in told if line.get("event") == "lines_dropped"] == [7]


def test_a_stream_that_is_closed_stops_nobody():
    stream = io.StringIO()
    handler = logs.Handoff(stream, logs.TextLines())
    stream.close()
    handler.handle(record_of("a"))
    handler.flush()
