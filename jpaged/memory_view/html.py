"""A recording as one page: data, program and style in a single file that loads nothing and sends nothing.

The texts in it are whatever users sent. They reach the page as JSON in which no `<` is left, so that nothing can end
the script element that they stand in, and the program only ever writes them as text. A content security policy in the
page forbids every address.
"""

import html
import importlib.resources
import itertools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jpaged.memory_view.snapshot import Measures

if TYPE_CHECKING:
    from jpaged.memory_view.recorder import Recording

SCRIPTS = ("replay.js", "theme.js", "map.js", "timeline.js", "panels.js", "main.js")
NOTEBOOK_HEIGHT = 760


def page(recording: "Recording") -> str:
    """The whole page, as text."""
    rest, pieces = _read("page.html"), []
    for marker, content in (  # in the order of the template: no marker is looked for in what was put in
        ("{{style}}", _read("style.css")),
        ("{{recording}}", script_json(data(recording))),
        ("{{scripts}}", "\n".join(map(_read, SCRIPTS))),
    ):
        before, _, rest = rest.partition(marker)
        pieces += [before, content]
    return "".join([*pieces, rest])


def notebook_frame(recording: "Recording") -> str:
    """The page in a frame that can reach neither the notebook nor the network."""
    source = html.escape(page(recording), quote=True)
    style = f"width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{source}"></iframe>'


def data(recording: "Recording") -> dict[str, Any]:
    """What the page replays: the frames, and columns with a number for each step, as differences."""
    names = Measures.__slots__
    return {
        "title": recording.title,
        "numBlocks": recording.pool.num_blocks,
        "blockSize": recording.pool.block_size,
        "hostBlocks": recording.pool.host_blocks,
        "frames": recording.frames,
        "milliseconds": _differences(recording.milliseconds),
        "measures": {name: _differences(getattr(m, name) for m in recording.measures) for name in names},
        "vocabulary": _vocabulary(recording),
    }


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)  # no UTF-8 has those


def _vocabulary(recording: "Recording") -> dict[int, str]:
    """The texts of the tokens that occur."""
    if recording.decode is None:
        return {}
    tokens: set[int] = set()
    for frame in recording.frames:
        tokens.update(token for token in frame.get("next", ()) if token >= 0)
        for change in frame.get("tokens", ()):
            tokens.update(change[2:])
    return {token: recording.decode(token) for token in sorted(tokens)}


def _differences(values: Iterable[int]) -> list[int]:
    column = list(values)
    return [after - before for before, after in itertools.pairwise([0, *column])]


def _read(name: str) -> str:
    return (importlib.resources.files("jpaged.memory_view") / "page" / name).read_text(encoding="utf-8")
