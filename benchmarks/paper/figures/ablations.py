"""Figure 18b (block size) and figure 19 (swapping against recomputing)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from benchmarks.paper.cost import MODELS, CostModel
from benchmarks.paper.figures.base import Row, point
from benchmarks.paper.published import BLOCK_SIZES, FIG18B, FIG19A_RECOMPUTE, FIG19A_SWAP, FIG19B
from benchmarks.paper.scenario import Scenario
from benchmarks.paper.store import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MODES: dict[Literal["swap", "auto"], str] = {"auto": "recompute", "swap": "swap"}

DURATION = 600
"""Seconds of arrivals, as in the artefact. The loads are overloads: with longer traces every latency is larger."""


class BlockSizes:
    """Normalized latency by block size, at rates just past what the paper's vLLM could take."""

    title = "Block sizes, OPT-13B"
    rates: ClassVar = {"sharegpt": 2.01, "alpaca": 30.1}

    def _job(self, data: str, size: int, quick: bool) -> Job:
        rate = self.rates[data]
        return point(
            Scenario(system="jpaged", model="opt-13b", data=data, rate=rate, duration=DURATION, block_size=size), quick
        )

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [self._job(data, size, quick) for data in self.rates for size in BLOCK_SIZES]

    def _latency(self, store: Store, data: str, size: int, quick: bool) -> float:
        return store[self._job(data, size, quick)]["normalized_latency"]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        return [
            Row("fig18b", f"{data}, block {size}", "s/token", paper, self._latency(store, data, size, quick))
            for data in self.rates
            for size, paper in zip(BLOCK_SIZES, FIG18B[data], strict=True)
        ]

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        for axes, data in zip(canvas.subplots(1, 2), self.rates, strict=True):
            axes.plot(BLOCK_SIZES, FIG18B[data], "o:", color="silver", label="paper")
            axes.plot(BLOCK_SIZES, [self._latency(store, data, s, quick) for s in BLOCK_SIZES], "o-", label="jpaged")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(title=f"{data}, {self.rates[data]} req/s", xlabel="block size", ylabel="s/token")
            axes.legend(fontsize=8)


class Recovery:
    """Swapping out and in against computing again: 256 tokens by the cost model's formulas (a), and end to end (b)."""

    title = "Swapping against recomputing, OPT-13B: 256 tokens (a); ShareGPT, 2.01 req/s (b)"

    @staticmethod
    def _job(size: int, mode: Literal["swap", "auto"], quick: bool) -> Job:
        scenario = Scenario(
            system="jpaged",
            model="opt-13b",
            data="sharegpt",
            rate=BlockSizes.rates["sharegpt"],
            duration=DURATION,
            block_size=size,
            preemption_mode=mode,  # auto recomputes a lone sequence
        )
        return point(scenario, quick)

    def jobs(self, quick: bool) -> Iterable[Job]:
        return [self._job(size, mode, quick) for size in BLOCK_SIZES for mode in MODES]

    @staticmethod
    def _times(size: int) -> tuple[float, float]:
        cost = CostModel(MODELS["opt-13b"], block_size=size)
        return 1e3 * cost.swap(256), 1e3 * cost.recompute(256)

    def _latency(self, store: Store, size: int, mode: Literal["swap", "auto"], quick: bool) -> float:
        return store[self._job(size, mode, quick)]["normalized_latency"]

    def rows(self, store: Store, quick: bool) -> list[Row]:
        rows = [
            Row("fig19", f"a: swap out and in, block {size}", "ms", paper, self._times(size)[0])
            for size, paper in zip(BLOCK_SIZES, FIG19A_SWAP, strict=True)
        ]
        rows.append(Row("fig19", "a: recompute, any block size", "ms", FIG19A_RECOMPUTE, self._times(16)[1]))
        for size in BLOCK_SIZES:
            for mode, name in MODES.items():
                paper = FIG19B.get(size, {}).get(name)
                rows.append(
                    Row("fig19", f"b: {name}, block {size}", "s/token", paper, self._latency(store, size, mode, quick))
                )
        return rows

    def draw(self, store: Store, quick: bool, canvas: "Canvas") -> None:
        canvas.set_size_inches(9, 4)
        left, right = canvas.subplots(1, 2)
        swap, recompute = zip(*map(self._times, BLOCK_SIZES), strict=True)
        left.plot(BLOCK_SIZES, FIG19A_SWAP, "o:", color="silver", label="paper: swap")
        left.plot(BLOCK_SIZES, [FIG19A_RECOMPUTE] * len(BLOCK_SIZES), ":", color="black", label="paper: recompute")
        left.plot(BLOCK_SIZES, swap, "o-", label="model: swap")
        left.plot(BLOCK_SIZES, recompute, "-", label="model: recompute")
        left.set(ylabel="ms", ylim=(0, 150), title="a")
        for mode, name in MODES.items():
            right.plot(BLOCK_SIZES, [self._latency(store, s, mode, quick) for s in BLOCK_SIZES], "o-", label=name)
        right.set(ylabel="s/token", yscale="log", title="b")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("block size")
            axes.legend(fontsize=8)
