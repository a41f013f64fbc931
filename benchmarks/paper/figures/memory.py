"""What the pool holds: figure 2 (waste), figure 13 (batch), figure 15 (blocks saved by sharing)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from benchmarks.paper.figures.base import COLORS, LABELS, ORCAS, Row, point
from benchmarks.paper.published import FIG2, FIG13, FIG15
from benchmarks.paper.scenario import Scenario
from benchmarks.paper.store import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

PAGED = (*ORCAS, "jpaged")
KINDS = ("tokens", "reserved", "internal", "external and others")


class Waste:
    """Shares of the pool, OPT-13B, ShareGPT at 4 requests/s: overload (the artefact's run, 300 to 900 s)."""

    title = "Use of the KV cache, OPT-13B, ShareGPT"

    @staticmethod
    def _job(system: str, quick: bool) -> Job:
        return point(
            Scenario(system=system, model="opt-13b", data="sharegpt", rate=4, duration=900, window=(300, 900)), quick
        )

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [self._job(s, quick) for s in PAGED]

    def _shares(self, store: Store, quick: bool, system: str) -> list[float]:
        result = store[self._job(system, quick)]
        shares = [100 * result[k] for k in KINDS[:3]]
        return [*shares, 100 - sum(shares)]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        rows = [
            Row("fig2", f"{LABELS[s]}: {kind}", "%", paper, ours)
            for s in PAGED
            for kind, paper, ours in zip(KINDS, FIG2[s], self._shares(store, quick, s), strict=True)
            if paper or ours
        ]
        return rows + [
            Row("fig2", f"{LABELS[s]}: mean batch in overload", "requests", None, store[self._job(s, quick)]["batch"])
            for s in PAGED
        ]

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        axes = canvas.subplots()
        colors = ("tab:green", "tab:orange", "tab:red", "silver")
        for i, system in enumerate(PAGED):
            for source, shares in ((-0.2, FIG2[system]), (0.2, self._shares(store, quick, system))):
                bottom = 0.0
                for kind, share, color in zip(KINDS, shares, colors, strict=True):
                    label = kind if i == 0 and source < 0 else None
                    axes.bar(i + source, share, 0.38, bottom=bottom, color=color, label=label)
                    bottom += share
                axes.text(i + source, shares[0] / 2, f"{shares[0]:.1f}", ha="center", fontsize=8)
        axes.set_xticks(range(len(PAGED)), [f"{LABELS[s]}\npaper | ours" for s in PAGED], fontsize=8)
        axes.set_ylabel("% of the pool")
        canvas.legend(fontsize=8, loc="outside lower center", ncols=4)


class Batch:
    """Mean number of running requests, OPT-13B, from 600 s on."""

    title = "Mean batch, OPT-13B"
    rates: ClassVar = {"sharegpt": 2, "alpaca": 30}

    def _job(self, data: str, system: str, quick: bool) -> Job:
        rate = self.rates[data]
        return point(
            Scenario(system=system, model="opt-13b", data=data, rate=rate, duration=3600, window=(600, 3600)), quick
        )

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [self._job(data, s, quick) for data in self.rates for s in PAGED]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        return [
            Row("fig13", f"{data}: {LABELS[s]}", "requests", FIG13[data][s], store[self._job(data, s, quick)]["batch"])
            for data in self.rates
            for s in PAGED
        ]

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        for axes, data in zip(canvas.subplots(1, 2), self.rates, strict=True):
            for i, system in enumerate(PAGED):
                ours = store[self._job(data, system, quick)]["batch"]
                for offset, value, alpha in ((-0.2, FIG13[data][system], 0.4), (0.2, ours, 1.0)):
                    axes.bar(i + offset, value, 0.38, color=COLORS[system], alpha=alpha)
                    axes.text(i + offset, value, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
            axes.set_xticks(range(len(PAGED)), [LABELS[s].replace(" ", "\n") for s in PAGED], fontsize=8)
            axes.set_title(f"{data}, {self.rates[data]} req/s (pale: paper)", fontsize=9)


class Sharing:
    """Blocks that sharing saves: 1 - 1 / mean(table entries / blocks), from 300 s to 600 s.

    Samples of ShareGPT, of which few and large groups run, are watched to 1,800 s.
    """

    title = "Blocks saved by sharing, OPT-13B"
    rates: ClassVar = {"alpaca": 20.0, "sharegpt": 4.0}
    sizes = (2, 4, 6)

    def _job(self, data: str, beam: bool, n: int, quick: bool) -> Job:
        end = 1800 if data == "sharegpt" and not beam else 600
        scenario = Scenario(
            system="jpaged",
            model="opt-13b",
            data=data,
            rate=self.rates[data],
            duration=end,
            n=n,
            beam=beam,
            window=(300, end),
        )
        return point(scenario, quick)

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [self._job(data, beam, n, quick) for data, beam in FIG15 for n in self.sizes]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        return [
            Row(
                "fig15",
                f"{data}: {'beam search' if beam else 'parallel sampling'}, {n}",
                "%",
                paper.get(n),
                100 * store[self._job(data, beam, n, quick)]["saved"],
            )
            for (data, beam), paper in FIG15.items()
            for n in self.sizes
        ]

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        canvas.set_size_inches(9, 6)
        for axes, ((data, beam), paper) in zip(canvas.subplots(2, 2).flat, FIG15.items(), strict=True):
            for i, n in enumerate(self.sizes):
                ours = 100 * store[self._job(data, beam, n, quick)]["saved"]
                for offset, value, color in ((-0.2, paper.get(n), "silver"), (0.2, ours, "tab:blue")):
                    if value is not None:
                        axes.bar(i + offset, value, 0.38, color=color)
                        axes.text(i + offset, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
            axes.set_xticks(range(3), [f"{n}" for n in self.sizes])
            axes.set_title(f"{data}, {'beam search' if beam else 'parallel sampling'} (gray: paper)", fontsize=9)
            axes.set_ylabel("% of blocks saved")
