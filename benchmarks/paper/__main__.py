"""The paper's figures (PagedAttention, arXiv 2309.06180), simulated: jpaged's scheduler and block manager and the
baselines over the paper's workloads, on a model of its GPUs. See docs/paper.md.

    python -m benchmarks.paper --traces FOLDER --output FOLDER [--quick] [--figure fig2 fig12a ...]

Writes results.md, results.json and one SVG a figure. What has been simulated is kept in runs.json and used again.
"""

import argparse
from pathlib import Path

from benchmarks.paper import report
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.store import Store

RECORDING = Path(__file__).with_name("beams_smollm2.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces (docs/paper.md names them)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--figure", nargs="+", choices=list(FIGURES), default=list(FIGURES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="short traces: does everything run?")
    parser.add_argument("--fresh", action="store_true", help="forget what runs.json knows")
    parser.add_argument("--beams", type=Path, default=RECORDING, help="recorded beam searches; default: SmolLM2-135M's")
    parser.add_argument("--synthetic-beams", action="store_true", help="invented beam searches instead")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = arguments.output / ("runs-quick.json" if arguments.quick else "runs.json")
    if arguments.fresh:
        runs.unlink(missing_ok=True)
    store = Store(runs, arguments.traces, arguments.processes, None if arguments.synthetic_beams else arguments.beams)
    store.compute(job for name in arguments.figure for job in FIGURES[name].jobs(arguments.quick))
    report.write(arguments.figure, store, arguments.quick, arguments.output)
    print((arguments.output / "results.md").read_text())


if __name__ == "__main__":
    main()
