import pytest

from tests.server.support import serving


@pytest.fixture(scope="module")
def live(tiny):
    """A server over the tiny Llama, shared by a module's tests.

    Without a prefix cache: other engines of the tests write to the same pool while this one is idle.
    """
    with serving(tiny(enable_prefix_caching=False)) as server:
        yield server


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
