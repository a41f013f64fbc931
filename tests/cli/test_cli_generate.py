"""jpaged generate: what it prints, and where."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from jpaged import SamplingParams
from tests.cli.conftest import TINY
from tests.engine.support import run

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def answers(tiny):
    """(as a chat, as plain text): what an engine says to the question, greedily, in 12 tokens."""
    engine = tiny()
    params = SamplingParams(temperature=0, max_tokens=12)
    engine.add_request("chat", [{"role": "user", "content": QUESTION}], params)
    engine.add_request("raw", QUESTION, params)
    engine.add_request("other", [{"role": "user", "content": "And that?"}], params)
    outputs = run(engine)
    return {name: output.outputs[0] for name, output in outputs.items()}


def test_one_prompt_is_answered_on_stdout_and_the_rest_goes_to_stderr(jpaged, answers):
    status, out, err = jpaged("generate", QUESTION, "--max-tokens", "12")
    assert (status, out) == (0, answers["chat"].text + "\n")
    lines = err.splitlines()
    assert lines[0].startswith("starting JAX ... ")
    assert lines[1].startswith("loading ")
    assert any(line.startswith("compiling a step for 1 row + ") for line in lines)
    assert "cut off" in lines[-1]


def test_raw_leaves_the_template_out(jpaged, answers):
    assert answers["raw"].token_ids != answers["chat"].token_ids
    assert jpaged("generate", QUESTION, "--raw", "--max-tokens", "12")[1] == answers["raw"].text + "\n"


def test_several_prompts_are_answered_in_order(jpaged, answers):
    out = jpaged("generate", QUESTION, "And that?", "--max-tokens", "12")[1]
    assert out == f"> {QUESTION}\n{answers['chat'].text}\n\n> And that?\n{answers['other'].text}\n"


def test_json_from_the_lines_of_stdin(jpaged, answers):
    status, out, _ = jpaged(
        "generate", "--json", "--max-tokens", "12", "--logprobs", "1", stdin=f"{QUESTION}\n\n  \nAnd that?\n"
    )
    first, second = (json.loads(line) for line in out.splitlines())
    assert status == 0
    assert [first["prompt"], second["prompt"]] == [QUESTION, "And that?"]
    sample = first["outputs"][0]
    assert (sample["text"], sample["token_ids"]) == (answers["chat"].text, answers["chat"].token_ids)
    assert sample["finish_reason"] == answers["chat"].finish_reason
    assert len(sample["logprobs"]) == len(sample["token_ids"])
    assert first["usage"]["completion_tokens"] == len(sample["token_ids"])
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert 0 < first["time_to_first_token"] <= first["e2e_latency"]


def test_several_samples_are_numbered(jpaged):
    out = jpaged("generate", QUESTION, "--max-tokens", "4", "--n", "2", "--temperature", "1")[1]
    assert out.startswith("[1] ")
    assert "\n[2] " in out


def test_repeated_flags_do_not_swallow_the_prompt(jpaged, answers):
    stop = answers["chat"].text[3:5]
    out = jpaged("generate", "--stop", stop, "--stop", "never-said", QUESTION, "--max-tokens", "12")[1]
    assert out == answers["chat"].text.split(stop)[0] + "\n"


def test_a_prompt_that_is_too_long_is_named(jpaged):
    status, out, err = jpaged("generate", "short", "long " * 300, "--max-tokens", "4")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("jpaged: error: prompt 2: the prompt has ")


def test_no_prompt_at_all(jpaged):
    status, _, err = jpaged("generate", tiny=False)
    assert status == 2
    assert "standard input has no lines" in err


def test_whoever_stops_reading_gets_no_traceback():
    command = [sys.executable, "-m", "jpaged.cli.main", "generate", "--max-tokens", "200", QUESTION, *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert "Error" not in err


def test_on_a_terminal_ctrl_c_ends_it_at_once_and_quietly():
    command = [sys.executable, "-m", "jpaged.cli.main", "generate", QUESTION, *TINY]
    ours, theirs = os.openpty()
    seen = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # how a terminal says that nobody writes any more
                break
            if b"starting JAX ... 0 s" in seen and process.poll() is None:
                process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.returncode == -signal.SIGINT
    assert seen == b"\r\x1b[2Kstarting JAX ... 0 s"


def test_the_real_model_answers(jpaged):
    status, out, _ = jpaged("generate", "What is the capital of France?", tiny=False)
    assert (status, out) == (0, "The capital of France is Paris.\n")


def test_an_answer_has_the_form_that_flags_ask_for(jpaged, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}')
    for form, pattern in (
        (("--json-schema", f"@{tmp_path / 'schema.json'}"), r"\[\s*[12],\s*[12]\s*\]"),
        (("--regex", "[ab]{3}"), "[ab]{3}"),
        (("--choice", "yes", "--choice", "no"), "yes|no"),
        (("--grammar", 'start: "x" "y"'), "xy"),
    ):
        status, out, _ = jpaged("generate", QUESTION, *form, "--max-tokens", "90")
        assert status == 0
        assert re.fullmatch(pattern, out.strip()), out


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (("--regex", "a", "--json-object"), "exactly one"),
        (("--json-schema", "@no-such-file"), "no-such-file"),
        (("--json-schema", "[1]"), "JSON schema"),
    ],
)
def test_a_form_that_is_none_is_refused(jpaged, form, message):
    status, _, err = jpaged("generate", QUESTION, *form)
    assert status == 2
    assert message in err
