"""Plots of a run's results, where matplotlib is installed."""

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
Lines = dict[str, list[tuple[float, float]]]


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes what there is numbers for: decode bandwidth, whole steps. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    plots = {
        "bandwidth.svg": (bandwidth_lines(results), "cached tokens of the batch", "share of a copy's bandwidth"),
        "step.svg": (step_lines(results), "batch", "memory floor / step"),
    }
    return [_draw(folder / name, *plot) for name, plot in plots.items() if plot[0]]


def bandwidth_lines(results: Results) -> Lines:
    """By implementation and heads: the best of the batches that have as many tokens."""
    lines: dict[str, dict[float, float]] = defaultdict(dict)
    for name, result in results.items():
        if name.startswith("bandwidth-"):
            for row in result["rows"]:
                if "of copy" in row:
                    line, tokens = (
                        lines[f"{name.removeprefix('bandwidth-')} {row['heads']}"],
                        row["batch"] * row["context"],
                    )
                    line[tokens] = max(line.get(tokens, 0.0), row["of copy"])
    return {name: sorted(line.items()) for name, line in lines.items()}


def step_lines(results: Results) -> Lines:
    """By model and context."""
    lines: Lines = defaultdict(list)
    for result in results.values():
        for row in result["rows"]:
            if "floor / step" in row:
                lines[f"{row['step']}, context {row['context']}"].append((row["batch"], row["floor / step"]))
    return {name: sorted(line) for name, line in lines.items()}


def _draw(path: Path, lines: Lines, x: str, y: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=x, ylabel=y)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    return path
