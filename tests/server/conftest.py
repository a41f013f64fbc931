import threading

import pytest

from jpaged import SamplingParams
from tests.engine.support import llm_of
from tests.server.support import serving


@pytest.fixture(scope="module")
def live(tiny):
    """A server over the tiny Llama, shared by a module's tests.

    Without a prefix cache: other engines of the tests write to the same pool while this one is idle.
    """
    with serving(tiny(enable_prefix_caching=False)) as server:
        yield server


@pytest.fixture(scope="module")
def good(live, tiny):
    """Sixteen streams that go on for as long as the module's tests run; each must be right."""
    [want] = llm_of(tiny()).generate("good", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    over, wrong, count = threading.Event(), [], [0]

    def stream():
        while not over.is_set():
            chunks = live.openai.completions.create(
                model="tiny", prompt="good", temperature=0, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
            )
            text = "".join(chunk.choices[0].text for chunk in chunks)
            count[0] += 1
            if text != want.outputs[0].text:
                wrong.append(text)

    threads = [threading.Thread(target=stream) for _ in range(16)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert count[0] >= 16


TEMPLATE = """{%- for t in tools or [] %}{{ t.function.name }};{% endfor -%}
{% for m in messages %}<s>{{ m.role }}:{{ m.content }}
{%- for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}</s>{% endfor %}"""


@pytest.fixture
def with_tools(tiny, tmp_path):
    """A server whose chat template has a place for tools."""
    engine = tiny()
    before = engine.tokenizer.chat_template
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    settings = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with serving(engine, chat_template=str(tmp_path / "t.jinja"), **settings) as live:
        yield live
    engine.tokenizer.chat_template = before
