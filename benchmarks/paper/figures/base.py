"""What every figure has."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from benchmarks.paper.scenario import Scenario
from benchmarks.paper.store import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LABELS = {
    "ft": "FasterTransformer",
    "orca-max": "Orca (Max)",
    "orca-pow2": "Orca (Pow2)",
    "orca-oracle": "Orca (Oracle)",
    "jpaged": "jpaged",
}
COLORS = {
    "ft": "gray",
    "orca-max": "tab:red",
    "orca-pow2": "tab:orange",
    "orca-oracle": "tab:green",
    "jpaged": "tab:blue",
}
ORCAS = ("orca-max", "orca-pow2", "orca-oracle")
QUICK_S = 20
"""Seconds of arrivals in a quick run: it shows that everything works, and its numbers mean nothing."""


class Row(NamedTuple):
    """One number of the paper beside ours."""

    figure: str
    what: str
    unit: str
    paper: float | None
    ours: float

    @property
    def ratio(self) -> float | None:
        return self.ours / self.paper if self.paper else None


class Figure(Protocol):
    title: str

    def jobs(self, quick: bool) -> Iterable[Job]: ...

    def rows(self, store: Store, quick: bool) -> list[Row]: ...

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None: ...


def point(scenario: Scenario, quick: bool) -> Job:
    """A job at the scenario's rate."""
    if not quick:
        return Job(scenario)
    window = scenario.window and (QUICK_S / 3, float(QUICK_S))
    return Job(dataclasses.replace(scenario, duration=QUICK_S, window=window))


def search(scenario: Scenario, quick: bool) -> Job:
    """A job that looks for the rate that can be taken."""
    if not quick:
        return Job(scenario, search=True)
    return Job(dataclasses.replace(scenario, duration=QUICK_S), search=True, tolerance=0.3)
