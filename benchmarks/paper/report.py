"""The table (Markdown and JSON) and the plots."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.paper.figures import FIGURES, Row
from benchmarks.paper.store import Store


def number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: Iterable[Row]) -> str:
    """paper | ours | ratio, a section a figure."""
    lines: list[str] = []
    figure = None
    for row in rows:
        if row.figure != figure:
            figure = row.figure
            lines += [
                "",
                f"### {figure}: {FIGURES[figure].title}",
                "",
                "| | paper | ours | ours / paper |",
                "|---|---|---|---|",
            ]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.what} ({row.unit}) | {number(row.paper)} | {number(row.ours)} | {ratio} |")
    return "\n".join(lines[1:]) + "\n"


def write(names: list[str], store: Store, quick: bool, output: Path) -> None:
    """results.md, results.json and a plot a figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters: small files
    matplotlib.rcParams["svg.hashsalt"] = "jpaged"  # equal results, equal files
    from matplotlib import pyplot

    rows = [row for name in names for row in FIGURES[name].rows(store, quick)]
    note = "**Quick run: these numbers mean nothing.**\n\n" if quick else ""
    (output / "results.md").write_text(note + markdown(rows))
    results = [row._asdict() | {"ratio": row.ratio} for row in rows]
    (output / "results.json").write_text(json.dumps({"quick": quick, "results": results}, indent=1) + "\n")
    for name in names:
        canvas = pyplot.figure(figsize=(7, 4), layout="constrained")
        FIGURES[name].draw(store, quick, canvas)
        canvas.suptitle(f"{name}: {FIGURES[name].title}", fontsize=10)
        canvas.savefig(output / f"{name}.svg", metadata={"Date": None})
        pyplot.close(canvas)
