"""A recording as one page: data, program and style in a single file that loads nothing and sends nothing. And the page
that shows a server's pool as it is now, which asks its server for nothing but that.

The texts in it are whatever users sent. They reach the page as JSON in which no `<` is left, so that nothing can end
the script element that they stand in, and the program only ever writes them as text. A content security policy in the
page forbids every address.
"""

import base64
import hashlib
import html
import importlib.resources
import itertools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jpaged.memory_view.snapshot import Measures

if TYPE_CHECKING:
    from jpaged.memory_view.recorder import Recording

LIVE_SCRIPTS = ("pool.js", "theme.js", "map.js", "panels.js", "chart.js", "live_panels.js", "live.js")
SCRIPTS = ("pool.js", "replay.js", "theme.js", "map.js", "timeline.js", "panels.js", "main.js")
NOTEBOOK_HEIGHT = 760


def page(recording: "Recording") -> str:
    """The whole page, as text."""
    recorded = f'<script type="application/json" id="recording">{script_json(data(recording))}</script>\n'
    scripts = "\n".join(map(_read, SCRIPTS))
    return _filled(
        head=_meta_policy("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
        + "<title>KV pool</title>",
        style=_read("style.css"),
        rest=_read("replay.html"),
        scripts=f"{recorded}<script>\n{scripts}\n</script>",
    )


def live_page() -> tuple[str, str]:
    """The page of a server, and the content security policy that it is to be sent with."""
    style = _read("style.css") + _read("live.css")
    scripts = "\n" + "\n".join(map(_read, LIVE_SCRIPTS)) + "\n"
    policy = (
        f"default-src 'none'; script-src {_hash(scripts)}; style-src {_hash(style)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    whole = _filled(
        head='<link rel="icon" href="data:,">\n<title>jpaged</title>',
        style=style,
        rest=_read("live.html"),
        scripts=f"<script>{scripts}</script>",
    )
    return whole, policy


def _filled(**contents: str) -> str:
    """What both pages have, a header and the block map, with contents for its markers; in the order in which they stand
    there: none is looked for in what was put in."""
    rest, pieces = _read("frame.html"), []
    for marker, content in contents.items():
        before, _, rest = rest.partition("{{" + marker + "}}")
        pieces += [before, content]
    return "".join([*pieces, rest])


def _meta_policy(policy: str) -> str:
    """The policy of a page that no server sends."""
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'


def _hash(content: str) -> str:
    """What a content security policy calls an element that is to be obeyed."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


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
        "layerGroups": recording.pool.layer_groups,
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
