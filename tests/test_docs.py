"""Code that the documentation shows is the code of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (path.name, match["file"], match["code"])
    for path in sorted((ROOT / "docs").glob("*.md"))
    for match in re.finditer(r"```python\n# (?P<file>\S+\.py)\n(?P<code>.*?)```", path.read_text(), re.DOTALL)
]


def test_there_is_code_to_compare():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize(("page", "file", "code"), BLOCKS, ids=lambda value: value[:40])
def test_shown_code_is_real(page, file, code):
    assert code.strip() in (ROOT / file).read_text(), f"{page} shows another {file}"
