"""The measurements for a GPU, on CPU: what fails is reported and does not stop the rest, and a run resumes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import engine, plots

ROOT = Path(__file__).parents[2]


def script(output: Path, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs run.sh in an interpreter that has none of the packages a bare GPU machine lacks."""
    (output / "sitecustomize.py").write_text(
        "import sys\nfor name in ('transformers', 'tokenizers', 'safetensors', 'huggingface_hub', 'orbax'):\n"
        "    sys.modules[name] = None\n"
    )
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": f"{output}:{path}"}
    command = [ROOT / "benchmarks/gpu/run.sh", "--dry-run", "--output", output, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output, timeout=300)


def results(output: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


BROKEN = """
import os

def run(recorder, how):
    recorder.case({"case": "before"}, lambda: {"us": 1.0})
    recorder.case({"case": "of its own"}, lambda: 1 / 0)
    recorder.case({"case": "after"}, lambda: {"us": 2.0, "ok": how != "wrong"})
    if how == "raises":
        raise RuntimeError("no such kernel")
    if how == "dies":
        os._exit(3)
"""


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    parts = ("broken:raises", "broken:dies", "broken:wrong")
    done = script(tmp_path, *(f"--part={part}" for part in parts))
    assert done.returncode == 1
    found = results(tmp_path)
    assert set(found) == {"broken-raises", "broken-dies", "broken-wrong"}
    for result in found.values():
        assert [row["case"] for row in result["rows"]] == ["before", "of its own", "after"]
        assert result["rows"][1]["error"].startswith("ZeroDivisionError")
    assert found["broken-raises"]["error"] == "RuntimeError: no such kernel"
    assert "exit status 3" in found["broken-dies"]["error"]
    assert found["broken-wrong"]["error"] is None
    assert "broken-wrong: after, 2.0, False: not within the tolerance" in done.stderr
    assert "no such kernel" in (tmp_path / "table.md").read_text()


def test_a_complete_part_is_not_run_again_unless_asked(tmp_path):
    (tmp_path / "counted.py").write_text(
        "from pathlib import Path\n"
        "def run(recorder, file):\n"
        "    with open(file, 'a') as runs:\n"
        "        runs.write('x')\n"
    )
    runs = tmp_path / "runs"
    for arguments, expected in (((), "x"), ((), "x"), (("--again",), "xx")):
        assert script(tmp_path, "--part=counted:runs", *arguments).returncode == 0
        assert runs.read_text() == expected
    path = tmp_path / "counted-runs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    script(tmp_path, "--part=counted:runs")
    assert runs.read_text() == "xxx", "cut short: once more"


def test_cases_without_time_are_counted(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    assert script(tmp_path, "--part=broken:slow", "--minutes=0").returncode == 0
    result = results(tmp_path)["broken-slow"]
    assert (result["rows"], result["left_out"], result["complete"]) == ([], 3, True)
    assert "3 cases were left out for lack of time" in (tmp_path / "table.md").read_text()


def test_what_the_plots_show():
    rows = [{"heads": "copy", "GB/s": 3000.0}, {"heads": "32/8", "batch": 8, "context": 1024, "skipped": "no room"}]
    rows += [
        {"heads": "32/8", "batch": b, "context": c, "of copy": x}
        for b, c, x in ((8, 128, 0.5), (1, 1024, 0.4), (8, 1024, 0.9))
    ]
    steps = [{"step": "m", "batch": b, "context": 100, "floor / step": x} for b, x in ((64, 0.8), (1, 0.7))]
    found = {"bandwidth-triton": {"rows": rows}, "step-m": {"rows": [{"step": "copy", "GB/s": 3000.0}, *steps]}}
    assert plots.bandwidth_lines(found) == {"triton 32/8": [(1024, 0.5), (8192, 0.9)]}
    assert plots.step_lines(found) == {"m, context 100": [(1, 0.7), (64, 0.8)]}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")
def test_plots_are_drawn(tmp_path):
    found = {"step-m": {"rows": [{"step": "m", "batch": 1, "context": 100, "floor / step": 0.7}]}}
    assert plots.draw(found, tmp_path) == [tmp_path / "step.svg"]
    assert "<svg" in (tmp_path / "step.svg").read_text()


def test_lengths_are_the_seeds_and_have_the_mean():
    drawn = engine.lengths(20000, 161.31, 10**6, seed=0)
    assert drawn[:100] == engine.lengths(20000, 161.31, 10**6, seed=0)[:100]
    assert sum(drawn) / len(drawn) == pytest.approx(161.31, rel=0.03)
    assert max(engine.lengths(1000, 300, 512, seed=1)) == 512
    assert min(drawn) >= 1
