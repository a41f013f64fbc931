"""Normalized latency over request rate: figures 12, 14, 16 and 17."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from benchmarks.paper.figures.base import COLORS, LABELS, Row, search
from benchmarks.paper.published import CAPACITY
from benchmarks.paper.scenario import THRESHOLD, Scenario
from benchmarks.paper.store import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Panel = dict[str, Scenario]
"""Scenarios by system; their rates are where the searches begin, the paper's result."""


def _panel(key: str, model: str, data: str, duration: float, requests: int = 0, **fields) -> Panel:
    """Scenarios of a duration, but of so many requests at least, and of an hour at most."""
    return {
        system: Scenario(
            system=system,
            model=model,
            data=data,
            rate=rate,
            duration=min(max(duration, requests / rate), HOUR),
            **fields,
        )
        for system, rate in CAPACITY[key].items()
    }


HOUR, QUARTER = 3600.0, 900.0
# The paper's traces last an hour, 15 minutes for OPT-175B. Ours of Alpaca, whose requests are short, last 15 minutes,
# and 5 where they are samples, beams or translations.
CURVES: Mapping[str, dict[str, Panel]] = {
    "fig12a": {"fig12a": _panel("fig12a", "opt-13b", "sharegpt", HOUR)},
    "fig12b": {"fig12b": _panel("fig12b", "opt-66b", "sharegpt", HOUR)},
    "fig12c": {"fig12c": _panel("fig12c", "opt-175b", "sharegpt", QUARTER)},
    "fig12d": {"fig12d": _panel("fig12d", "opt-13b", "alpaca", QUARTER)},
    "fig12e": {"fig12e": _panel("fig12e", "opt-66b", "alpaca", QUARTER)},
    "fig12f": {"fig12f": _panel("fig12f", "opt-175b", "alpaca", QUARTER)},
    "fig14": {
        f"{kind} {n}": _panel(f"{kind} {n}", "opt-13b", "alpaca", 300.0, 1500, n=n, beam=kind == "beam")
        for kind in ("parallel", "beam")
        for n in (2, 4, 6)
    },
    "fig16": {f"prefix {p}": _panel(f"prefix {p}", "llama-13b", "translation", 300.0, prefix=p) for p in (80, 341)},
    "fig17": {"chat": _panel("chat", "opt-13b", "chat", HOUR)},
}
TITLES = {
    "fig12a": "OPT-13B, 1 GPU, ShareGPT",
    "fig12b": "OPT-66B, 4 GPUs, ShareGPT",
    "fig12c": "OPT-175B, 8 GPUs, ShareGPT",
    "fig12d": "OPT-13B, 1 GPU, Alpaca",
    "fig12e": "OPT-66B, 4 GPUs, Alpaca",
    "fig12f": "OPT-175B, 8 GPUs, Alpaca",
    "fig14": "Parallel sampling and beam search, OPT-13B, Alpaca",
    "fig16": "Translation behind a common prefix, LLaMA-13B",
    "fig17": "Chat, OPT-13B, synthetic conversations of ShareGPT lengths",
}


@dataclasses.dataclass(frozen=True)
class Curves:
    name: str
    panels: dict[str, Panel]

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [search(scenario, quick) for panel in self.panels.values() for scenario in panel.values()]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        rows = []
        for key, panel in self.panels.items():
            paper = CAPACITY[key]
            ours = {system: store[search(s, quick)]["capacity"] for system, s in panel.items()}
            prefix = "" if key == self.name else f"{key}: "
            rows += [Row(self.name, prefix + LABELS[s], "req/s", paper[s], ours[s]) for s in ours]
            rows += [
                Row(
                    self.name,
                    f"{prefix}jpaged over {LABELS[s]}",
                    "x",
                    paper["jpaged"] / paper[s],
                    ours["jpaged"] / ours[s],
                )
                for s in ours
                if s != "jpaged"
            ]
        return rows

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        columns = min(3, len(self.panels))
        rows = -(-len(self.panels) // columns)
        canvas.set_size_inches(4.5 * columns + 1, 3.2 * rows + 0.6)
        for i, (key, panel) in enumerate(self.panels.items()):
            axes = canvas.add_subplot(rows, columns, i + 1)
            for system, scenario in panel.items():
                points = store[search(scenario, quick)]["points"]
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=COLORS[system], label=LABELS[system])
                axes.axvline(CAPACITY[key][system], color=COLORS[system], ls=":", lw=1)
            axes.axhline(THRESHOLD, color="black", lw=0.5)
            axes.set(ylim=(0, 1), xlabel="requests/s", ylabel="s/token")
            ours = [store[search(s, quick)]["capacity"] for s in panel.values()]
            axes.set_xlim(left=0, right=1.1 * max(*ours, *CAPACITY[key].values()))
            if key != self.name:
                axes.set_title(key)
            if i == 0:
                axes.legend(fontsize=8)
