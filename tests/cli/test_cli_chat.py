"""jpaged chat: the conversation it keeps, its commands, and Ctrl-C."""

import os
import re
import signal

import pytest

from jpaged import SamplingParams
from jpaged.cli.chat import Conversation
from jpaged.cli.session import CompileReport
from jpaged.cli.status import Status
from jpaged.sampling_params import RequestOutputKind


@pytest.fixture
def conversation(tiny):
    def make(max_tokens=8, **arguments):
        status = Status()
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        return Conversation(tiny(), params, status, CompileReport(status), **arguments)

    return make


def test_a_pipe_is_a_conversation(jpaged):
    status, out, err = jpaged(
        "chat",
        "--stats",
        "--max-tokens",
        "8",
        "--ignore-eos",
        "--block-size",
        "4",
        stdin="Hi there.\n\nAnd you?\n/reset\nHi there.\n/exit\nNever read.\n",
    )
    assert status == 0
    # The tiny model's answers have line breaks of their own. The third is the first again.
    assert re.fullmatch(r"(.+)\n.+\n\1\n", out, re.DOTALL)
    stats = re.findall(r"\[(\d+) prompt tokens, (\d+) of them cached; (\d+) generated", err)
    assert len(stats) == 3
    (prompt, cached, generated), (prompt2, cached2, _), _ = [tuple(map(int, s)) for s in stats]
    assert (cached, generated) == (0, 8)
    assert prompt2 > prompt + generated
    assert cached2 >= prompt - 4  # the first turn is not computed again


def test_what_was_said_is_sent_again(conversation, capsys):
    talk = conversation()
    talk.take("One.")
    answer = capsys.readouterr().out.rstrip("\n")
    talk.take("/system Be short.")
    talk.take("Two.")
    assert talk._messages[:3] == [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Two."},
    ]
    talk.take("/reset")
    assert talk._messages == []
    talk.take("/system")
    assert "Be short." in capsys.readouterr().err


def test_an_unknown_command_is_not_a_message(conversation, capsys):
    talk = conversation()
    talk.take("/quit-it now")
    assert "No command /quit-it" in capsys.readouterr().err
    assert talk._messages == []


def test_a_conversation_that_outgrows_the_model_is_told_so_and_goes_on(conversation, capsys):
    talk = conversation()
    talk.take("word " * 400)
    out, err = capsys.readouterr()
    assert out == ""
    assert "/reset forgets the conversation" in err
    talk.take("Hi.")
    assert capsys.readouterr().out.strip()


def test_ctrl_c_stops_the_answer_and_keeps_the_session(conversation, capsys, monkeypatch):
    talk = conversation(max_tokens=150)
    before = signal.getsignal(signal.SIGINT)
    step = talk._engine.step

    def step_with_interrupt():
        outputs = step()
        if outputs and outputs[0].metrics.first_token_time is not None:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(talk._engine, "step", step)
        return outputs

    monkeypatch.setattr(talk._engine, "step", step_with_interrupt)
    talk.take("Tell me all.")
    stopped = capsys.readouterr().out.rstrip("\n")
    assert talk._messages[-1] == {"role": "assistant", "content": stopped}
    assert talk._engine.blocks.num_used == 0
    assert not talk._engine.has_unfinished_requests()
    assert signal.getsignal(signal.SIGINT) is before
    talk.take("/reset")
    talk.take("Tell me all.")
    whole = capsys.readouterr().out.rstrip("\n")
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
