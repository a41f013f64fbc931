"""The page: one file, that loads nothing, and in which texts stay texts."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from jpaged import SamplingParams
from jpaged.memory_view import record
from jpaged.memory_view.delta import apply, empty
from jpaged.memory_view.html import script_json
from tests.engine.support import run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--{{scripts}}\u2028\ud800&amp;"


@pytest.fixture(scope="module")
def recording(tiny):
    engine = tiny(num_blocks=40)
    for name in (HOSTILE, "plain"):
        params = SamplingParams(temperature=0, max_tokens=5)
        engine.add_request(name, {"prompt_token_ids": list(range(5, 30))}, params)
    with record(engine, title=HOSTILE) as recording:
        run(engine)
    recording.decode = lambda token: HOSTILE if token % 2 else f"<b>{token}</b>"
    return recording


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def parse(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements


def test_hostile_ids_and_texts_are_data_and_nothing_else(recording):
    page = parse(recording.to_html())
    assert [tag for tag, _ in page.tags].count("script") == 2, "the data and the program"
    assert not any(tag == "img" or any(name.startswith("on") for name in attrs) for tag, attrs in page.tags)
    data = json.loads(page.scripts[0])
    shown = HOSTILE.replace("\ud800", "")
    assert data["title"].replace("\ud800", "") == shown
    assert data["frames"][0]["requests"][0][1].replace("\ud800", "") == shown
    assert data["vocabulary"]["6"] == "<b>6</b>"
    assert not re.search("[<>&\u2028]", page.scripts[0])


def test_the_data_are_the_recording(recording):
    data = json.loads(parse(recording.to_html()).scripts[0])
    now, snapshots = empty(recording.pool), []
    for frame in data["frames"]:
        now = apply(now, frame)
        snapshots.append(now)
    assert snapshots == list(recording.snapshots())
    total, used = 0, []
    for difference in data["measures"]["used"]:
        total += difference
        used.append(total)
    assert used == [m.used for m in recording.measures]
    tokens = {token for snapshot in snapshots for sequence in snapshot.sequences for token in sequence.tokens}
    assert {int(token) for token in data["vocabulary"]} == tokens


def test_the_page_loads_nothing(recording):
    recording.title = "plain"
    text = recording.to_html()
    page = parse(text)
    recording.title = HOSTILE
    assert not re.search(r"https?://|url\(|@import|\bimport\b|fetch\(|XMLHttpRequest|WebSocket|innerHTML", text)
    assert not any(name in attrs for _, attrs in page.tags for name in ("src", "href", "action", "data"))
    [policy] = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_every_marker_was_filled(tiny):
    with record(tiny()) as recording:
        pass
    assert "{{" not in recording.to_html()
    assert parse(recording.to_html()).scripts[0].startswith("{")


def test_a_notebook_shows_it_in_a_frame_without_rights(recording):
    frame = recording._repr_html_()
    [(tag, attributes)] = parse(frame).tags
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == recording.to_html()
    assert html.escape(HOSTILE) not in frame, "it is escaped twice: as JSON and as an attribute"


def test_it_is_written_to_a_file(recording, tmp_path):
    recording.save(tmp_path / "memory.html")
    assert (tmp_path / "memory.html").read_text(encoding="utf-8") == recording.to_html()


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028\u2029", "\ud83d\ude00 \udc00", '"\\', "é😀"])
def test_json_in_a_script_is_still_the_same_json(text):
    encoded = script_json({"text": text})
    assert json.loads(encoded.encode())["text"].encode("utf-16", "surrogatepass") == text.encode(
        "utf-16", "surrogatepass"
    )
    assert not re.search("[<>&\u2028\u2029]", encoded)
