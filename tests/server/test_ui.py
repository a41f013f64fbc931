"""The live page: what it is sent, who may see it, and what a browser makes of it."""

import base64
import json
import threading

import httpx2 as httpx
import pytest

from jpaged.memory_view.delta import apply, empty
from jpaged.memory_view.live import KEPT, Feed, look
from jpaged.server.recent import Recent, Totals
from tests.browser import CHROMIUM, Browser
from tests.memory_view.runs import random_steps, small_engine
from tests.server.support import serving

SECRET = "a secret that nobody shall see"


def test_readers_who_come_when_they_like_see_what_there_is():
    """Each of them has the same picture as one who has seen every step, whatever they missed."""
    engine = small_engine()
    feed = Feed(look(engine).pool)
    readers = {every: ("", empty(look(engine).pool)) for every in (1, 3, KEPT, KEPT + 5)}
    resets = dict.fromkeys(readers, 0)
    for step, _ in enumerate(random_steps(engine, seed=7, steps=3 * KEPT)):
        latest = look(engine)
        feed.push(latest)
        for every, (cursor, seen) in readers.items():
            if step % every == 0:
                answer = json.loads(json.dumps(feed.since(cursor)))
                seen = empty(seen.pool) if answer["reset"] else seen
                for frame in answer["frames"]:
                    seen = apply(seen, frame)
                assert seen == latest
                readers[every] = answer["cursor"], seen
                resets[every] += answer["reset"]
    assert resets == {1: 1, 3: 1, KEPT: 1, KEPT + 5: 3}


@pytest.mark.parametrize("cursor", ["", "-", "x-1", "1", "{}-999", "{}--1", "{}-1e3", "{}-²", "{}-" + "9" * 30])
def test_cursors_that_are_not_known_begin_anew(cursor):
    feed = Feed(look(small_engine()).pool)
    name = feed.since("")["cursor"].partition("-")[0]
    assert feed.since(cursor.format(name))["reset"]
    assert not feed.since(f"{name}-0")["reset"]


def test_rates_are_those_of_the_last_seconds():
    recent = Recent(now=1000.25)
    assert recent.rates(1000.5, Totals()).ttft_p50 is None
    for tick in range(400):  # 100 tokens a second for 40 s
        recent.add(1000.25 + tick / 10, Totals(generated=10 * (tick + 1), prompt=2 * (tick + 1)))
    now, totals = 1040.2, Totals(generated=4000, prompt=800)
    rates = recent.rates(now, totals)
    assert rates.generated == pytest.approx(100, rel=0.11)  # to a whole second
    assert rates.prompt == pytest.approx(20, rel=0.11)
    assert recent.rates(now + 60, totals).generated == 0, "nothing has happened since"
    recent.add(now + 100, Totals(generated=4050))
    assert recent.rates(now + 100, Totals(generated=4050)).generated == 5
    for wait in range(1, 101):
        recent.add_first_token(now, wait / 100)
    assert (recent.rates(now, totals).ttft_p50, recent.rates(now, totals).ttft_p99) == (0.5, 0.99)
    assert recent.rates(now + 61, totals).ttft_p50 is None


@pytest.fixture(scope="module")
def shown(tiny):
    with serving(tiny(enable_prefix_caching=False), key="key&1", api_key=("key&1",), enable_ui=True) as live:
        yield live


def test_it_is_off_unless_asked_for(live):
    assert live.http.get("/ui").status_code == live.http.get("/ui/state").status_code == 404


def test_a_browser_may_send_a_key_as_password(shown):
    """And elsewhere it may not: a browser sends passwords along with what other sites make it send."""
    stranger = httpx.Client(base_url=shown.url)
    for path in ("/ui", "/ui/state"):
        answer = stranger.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert stranger.get(path, auth=("anybody", "key&1")).status_code == 200
        assert stranger.get(path, headers={"Authorization": "Bearer key&1"}).status_code == 200
        for wrong in ("key", "", "key&1:"):
            assert stranger.get(path, auth=("key&1", wrong)).status_code == 401
        for broken in ("Basic", "Basic é", "Basic " + base64.b64encode(b"key&1").decode()):
            assert stranger.get(path, headers={"Authorization": broken.encode()}).status_code == 401
    answer = stranger.get("/version", auth=("anybody", "key&1"))
    assert answer.status_code == 401
    assert "www-authenticate" not in answer.headers
    stranger.close()


def test_no_text_and_no_token_is_told(shown):
    """Neither what was asked nor what was answered: the page may be shown on a wall."""
    body = {"prompt": [77] * 9, "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True, "logit_bias": {"78": 100}}  # fmt: skip
    running = []
    while not running:  # a request of the tiny model may be over before anybody looks
        with shown.http.stream("POST", "/v1/completions", json=body) as stream:
            for _ in stream.iter_lines():
                state = shown.http.get("/ui/state").json()
                running += [state] if state["measures"]["running"] else []
    for answer in running:
        [frame] = answer["frames"]
        assert "tokens" not in frame
        assert "next" not in frame
        assert frame["lengths"][1] >= 9
    assert shown.http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 1}).status_code == 200
    assert SECRET not in shown.http.get("/ui/state").text


def test_long_cursors_are_refused(shown):
    assert shown.http.get("/ui/state", params={"cursor": "x" * 65}).status_code == 400


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or chrome on the path")
def test_in_a_browser(shown, tmp_path):
    """It shows what runs, obeys its own security policy, and survives a request with a hostile name."""
    hostile = "<img src=x onerror=\"document.title='hacked'\">"
    over = threading.Event()
    browser = Browser(tmp_path)

    def ask():
        for i in range(10_000):
            if over.is_set():
                return
            shown.post("/v1/completions", prompt="abc" * (i % 5 + 1), n=2, max_tokens=120, request_id=f"{hostile}{i}")

    threads = [threading.Thread(target=ask) for _ in range(1)]
    for thread in threads:
        thread.start()
    try:
        browser.open(shown.url.replace("http://", "http://me:key%261@") + "/ui")
        browser.wait_for("page.pool.history.length > 3 && page.pool.state.present.size > 0")
        browser.run("window.polls = page.pool.history.length")
        browser.wait_for("page.pool.history.length > polls && document.querySelector('#request-rows td small')")
        assert browser.run("document.querySelector('#request-rows').textContent").startswith(f"cmpl-{hostile}")
        assert browser.run("document.images.length") == 0
        assert browser.run("document.querySelectorAll('#counters dd')[3].textContent") == "1"
        browser.run("document.querySelector('#request-rows tr').click()")
        browser.run("dispatchEvent(new KeyboardEvent('keydown', {key: 'c'}))")
        assert browser.run("page.map.mode") == "references"
        browser.run("page.tip.show(page.pool.state.sequences.concat([{blocks: [1]}])[0].blocks[0] ?? 1, 10, 10)")
        assert "slots written" in browser.run("document.getElementById('tip').textContent")
        assert browser.run("document.title") == "jpaged: tiny"
        over.set()
        for thread in threads:
            thread.join()
        browser.wait_for("page.pool.state.present.size === 0 && page.answer.measures.used === 0")
        assert browser.run("page.problem") is None
        assert browser.messages == []
    finally:
        over.set()
        browser.close()
