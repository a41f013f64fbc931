"""jpaged top: one picture of a live server; and what it says when there is none."""

import dataclasses
import re
import threading

import pytest

from jpaged.cli.top import Top, plain
from jpaged.cli.top.reader import Reader, ServerError
from jpaged.cli.top.screen import draw, duration
from jpaged.errors import InvalidConfigError
from tests.server.support import serving


@pytest.fixture(scope="module")
def watched(tiny):
    with serving(tiny(enable_prefix_caching=False), key="key", api_key=("key",), enable_ui=True, enable_admin_endpoints=True) as live:  # fmt: skip
        yield live


@pytest.fixture
def paused(watched):
    """Two requests that wait, one of them with a name that a terminal would obey."""
    watched.post("/pause")
    bodies = [{"prompt": "abc", "max_tokens": 4, "n": 2, "request_id": name} for name in ("one\x1b[2J", "two")]
    threads = [threading.Thread(target=watched.post, args=("/v1/completions",), kwargs=body) for body in bodies]
    for thread in threads:
        thread.start()
    while watched.llm.num_unfinished_requests < 2:
        pass
    yield watched
    watched.post("/resume")
    for thread in threads:
        thread.join()
    watched.idle()


def test_one_picture(paused, capsys, monkeypatch):
    monkeypatch.setenv("JPAGED_API_KEY", "key, another")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    assert Top(url=paused.url, once=True).run() == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no terminal"
    lines = out.splitlines()
    assert lines[0].startswith(f"tiny  {paused.url} ")
    assert lines[1].startswith("generating ")
    assert lines[2].startswith("0 running | 2 waiting | 0 swapped | prefix hits ")
    assert re.match(r"pool ░+ 0 % of 512 blocks x 4 \| shared 0 \| cached 0 \| preempted 0 \(0 tokens lost\)", lines[3])
    assert lines[5].startswith("><")
    table = [line.split() for line in lines if line.startswith("█")]
    prompt = len(paused.post("/tokenize", prompt="abc").json()["tokens"])
    names = ("cmpl-one?[2J", "cmpl-two")
    assert sorted(row[1:8] for row in table) == [[name, "×2", "waiting", str(prompt), "+", "0", "0"] for name in names]


def test_it_fits_the_terminal(paused):
    picture = Reader(paused.url, "key").read()
    for width, height in ((80, 24), (40, 8), (200, 60), (20, 3)):
        lines = draw(picture, paused.url, width, height)
        assert len(lines) <= height
        assert "\x1b[2J" not in "".join(lines)
    crowd = [dataclasses.replace(picture.snapshot.requests[0], number=i) for i in range(1000)]
    many = dataclasses.replace(picture, snapshot=dataclasses.replace(picture.snapshot, requests=tuple(crowd)))
    assert plain(draw(many, paused.url, 80, 24)[-1]).startswith("  and 99")


def test_a_reader_follows_the_server(watched):
    reader = Reader(watched.url, "key")
    first = reader.read()
    watched.post("/v1/completions", prompt=[7] * 20, max_tokens=12, ignore_eos=True)
    watched.idle()
    second = reader.read()
    assert second.generated_tokens == first.generated_tokens + 12
    assert second.prompt_tokens == first.prompt_tokens + 20
    assert second.ended["length"] == first.ended["length"] + 1
    assert second.generated >= 1.2, "12 tokens in at most ten seconds"


def test_without_the_page_there_are_the_metrics(live):
    reader = Reader(live.url + "/")
    first = reader.read()
    assert (first.title, first.snapshot, first.generated) == ("tiny", None, None)
    live.post("/v1/completions", prompt="a", max_tokens=3, ignore_eos=True)
    second = reader.read()
    assert second.generated > 0
    assert second.generated_tokens == first.generated_tokens + 3
    lines = [plain(line) for line in draw(second, live.url, 100, 30)]
    assert lines[3].startswith("pool ░")
    assert lines[-1] == "For the pool and the requests, start the server with --enable-ui."


def test_a_wrong_key_is_said(watched, monkeypatch):
    monkeypatch.delenv("JPAGED_API_KEY", raising=False)
    with pytest.raises(ServerError, match=r"/ui/state\?cursor= answers 401: an API key is missing .* JPAGED_API_KEY"):
        Top(url=watched.url, once=True).run()


def test_nobody_there(unused_port):
    with pytest.raises(ServerError, match=r"http://127.0.0.1:\d+ does not answer: .*refused"):
        Reader(f"http://127.0.0.1:{unused_port}").read()


def test_somebody_else_there(live):
    with pytest.raises(ServerError, match="answers 404"):
        Reader(f"{live.url}/v1/models").read()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", ""])
def test_what_is_no_url(url):
    with pytest.raises(InvalidConfigError, match="not the URL of a server"):
        Reader(url)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.25, "250 ms"), (3.14, "3.1 s"), (59, "59 s"), (300, "5 min"), (9000, "2 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
