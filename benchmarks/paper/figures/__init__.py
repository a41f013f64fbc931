"""One object a figure: the jobs that it needs, the rows of its table, its plot."""

from benchmarks.paper.figures.ablations import BlockSizes, Recovery
from benchmarks.paper.figures.base import Figure, Row
from benchmarks.paper.figures.curves import CURVES, Curves
from benchmarks.paper.figures.memory import Batch, Sharing, Waste

FIGURES: dict[str, Figure] = {
    "fig2": Waste(),
    **{name: Curves(name, panels) for name, panels in CURVES.items()},
    "fig13": Batch(),
    "fig15": Sharing(),
    "fig18b": BlockSizes(),
    "fig19": Recovery(),
}
FIGURES = dict(sorted(FIGURES.items(), key=lambda item: (int("".join(filter(str.isdigit, item[0]))), item[0])))

__all__ = ["FIGURES", "Figure", "Row"]
