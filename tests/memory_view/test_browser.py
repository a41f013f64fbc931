"""The page in a real browser: what it rebuilds is what was recorded, and nothing goes wrong while it does."""

import base64
import json
import re
import subprocess
from collections import Counter

import pytest

from jpaged.memory_view import Recording, record
from tests.browser import CHROMIUM
from tests.memory_view.runs import random_steps, small_engine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or chrome on the path")

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"

# Goes to every step, forwards and then in jumps, and writes down what the page believes; presses keys and buttons.
DRIVER = """
<script>
const seen = {};
const look = () => {
  const { state } = page.replay;
  const { references, written, placed } = page.replay.blocks();
  return [[...references], [...written], [...placed], [...state.cached].sort((a, b) => a - b),
    state.sequences.map((s) => s.tokens.slice()), state.counters, [...state.present].sort((a, b) => a - b)];
};
const press = (key, shiftKey = false) => dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey, cancelable: true }));
seen.forwards = page.replay.frames.map((_, step) => (page.seek(step), look()));
seen.jumps = page.replay.frames.map((_, i) => (page.seek((i * 37) % page.replay.length), [page.replay.at, look()]));
seen.keys = ["Home", "ArrowRight", "ArrowRight", "ArrowLeft", "PageDown", "End"].map((key) => (press(key), page.replay.at));
press("ArrowLeft", true);
seen.keys.push(page.replay.at);
const slider = document.getElementById("slider");
slider.value = 17;
slider.dispatchEvent(new Event("input"));
seen.slider = page.replay.at;
page.select(page.replay.state.sequences.find((s) => s.blocks.length && s.tokens.length).request);
seen.rows = document.querySelectorAll("#table-rows tr").length;
page.tip.show(page.replay.state.sequences.find((s) => s.blocks.length && s.tokens.length).blocks[0], 10, 10);
seen.tip = document.getElementById("tip").textContent;
press("c");
press("Escape");
press(" ");
seen.playing = page.playing;
press(" ");
seen.images = document.images.length;
seen.title = document.title;
const out = document.createElement("script");
out.type = "text/plain";
out.id = "seen";
out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
document.body.append(out);
</script>
"""


@pytest.fixture(scope="module")
def run_of_200() -> Recording:
    engine = small_engine(windows=(None, 8))
    with record(engine, title=HOSTILE) as recording:
        for _ in random_steps(engine, seed=11, steps=199):
            pass
    assert sum(m.shared for m in recording.measures) > 0
    recording.decode = lambda token: f"{HOSTILE}{token}"
    return recording


@pytest.fixture(scope="module")
def seen(run_of_200, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "memory.html"
    path.write_text(run_of_200.to_html().replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--enable-logging=stderr",
        "--v=0",
    )
    command = [CHROMIUM, *flags, "--virtual-time-budget=20000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    [found] = re.findall(r'id="seen">([^<]+)<', done.stdout)
    return json.loads(base64.b64decode(found))


def expected(recording: Recording) -> list:
    views = []
    for snapshot in recording.snapshots():
        count, size = recording.pool.num_blocks, recording.pool.block_size
        references, written, placed = snapshot.references(), Counter(), Counter()
        for sequence in snapshot.sequences:
            for entry, block in enumerate(sequence.blocks):
                logical = entry // recording.pool.layer_groups
                if block == 0:
                    continue
                for filled, bound in ((written, sequence.written), (placed, sequence.placed)):
                    filled[block] = max(filled[block], min(size, max(0, bound - logical * size)))
        views.append(
            [
                [references[b] for b in range(count)],
                [written[b] for b in range(count)],
                [placed[b] for b in range(count)],
                sorted(snapshot.cached),
                [list(s.tokens) for s in snapshot.sequences],
                [getattr(snapshot.counters, name) for name in type(snapshot.counters).__slots__],
                [r.number for r in snapshot.requests],
            ]
        )
    return views


def test_every_step_is_rebuilt(seen, run_of_200):
    views = expected(run_of_200)
    assert seen["forwards"] == views
    assert len(views) > 128, "longer than the distance of its checkpoints, or jumps back say little"
    assert [view for _, view in seen["jumps"]] == [views[at] for at, _ in seen["jumps"]]


def test_keys_and_the_slider_move_it(seen):
    assert seen["keys"] == [0, 1, 2, 1, 51, 199, 189]
    assert seen["slider"] == 17
    assert seen["playing"]


def test_a_chosen_request_shows_its_table_and_a_block_its_tokens(seen, run_of_200):
    snapshot = list(run_of_200.snapshots())[17]
    holder = next(s for s in snapshot.sequences if s.blocks and s.tokens)
    assert seen["rows"] == len(holder.blocks)
    assert f"Block {holder.blocks[0]}" in seen["tip"]
    assert f"{HOSTILE}{holder.tokens[0]}" in seen["tip"], "as text"


def test_hostile_texts_do_nothing(seen):
    assert (seen["images"], seen["title"]) == (0, f"KV pool: {HOSTILE}")
