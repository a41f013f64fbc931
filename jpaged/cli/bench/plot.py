"""A picture of latency against request rate."""

from pathlib import Path
from typing import Any

from jpaged.cli.bench.measures import METRICS
from jpaged.errors import InvalidConfigError


def check_plot(path: Path) -> None:
    """Refuses what can't be drawn before the measurement and not after it.

    Raises:
      InvalidConfigError: matplotlib is not installed, or the file has no folder or no known suffix.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidConfigError("--plot needs matplotlib: pip install matplotlib.") from error
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise InvalidConfigError(f"--plot {path}: a .png, .svg or .pdf file in an existing folder is needed.")


def plot(path: Path, results: list[dict[str, Any]], metrics: list[str]) -> None:
    """Draws each metric's mean, median and percentiles over the rate of the requests.

    Where all came at once, that is the rate at which they were served.
    """
    from matplotlib.figure import Figure

    points = sorted((_rate(result), i) for i, result in enumerate(results))
    rates, ordered = [rate for rate, _ in points], [results[i] for _, i in points]
    figure = Figure(figsize=(4 * len(metrics), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        ending = f"_{name}_ms"
        for key in (key for key in results[0] if key.endswith(ending) and not key.startswith("std")):
            axes.plot(rates, [result[key] for result in ordered], marker="o", label=key.removesuffix(ending))
        axes.set(title=METRICS[name], xlabel="requests per second", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path)


def _rate(result: dict[str, Any]) -> float:
    asked = result["request_rate"]
    return result["request_throughput"] if asked == "inf" else asked
