"""jpaged generate --show-memory, --memory-replay."""

import json
import re

import pytest

QUESTION = "What is it?"


def test_a_replay_is_written_and_the_answer_is_the_same(jpaged, tmp_path):
    plain = jpaged("generate", QUESTION, "And that?", "--max-tokens", "8")[1]
    path = tmp_path / "memory.html"
    status, out, err = jpaged("generate", QUESTION, "And that?", "--max-tokens", "8", "--memory-replay", str(path))
    assert (status, out) == (0, plain)
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="recording">(.*?)</script>', text, re.S)[1])
    assert err.splitlines()[-1] == f"{len(data['frames'])} steps recorded: open {path} in a browser"
    ends = [request for frame in data["frames"] for request in frame.get("requests", []) if request[3]]
    assert [(name, reason) for _, name, _, reason, *_ in ends] == [("0", "length"), ("1", "length")]


def test_without_a_terminal_nothing_is_drawn(jpaged):
    plain = jpaged("generate", QUESTION, "--max-tokens", "8")
    shown = jpaged("generate", "--show-memory", QUESTION, "--max-tokens", "8")
    assert shown[:2] == plain[:2]
    assert "\x1b" not in shown[2]


@pytest.mark.parametrize("path", [".", "no/such/folder/memory.html"])
def test_a_path_that_cannot_be_written_is_refused_before_the_model_is_loaded(jpaged, path):
    status, out, err = jpaged("generate", QUESTION, "--memory-replay", path)
    assert (status, out) == (2, "")
    assert err == f"jpaged: error: --memory-replay {path}: it must be a file in a folder that exists.\n"
