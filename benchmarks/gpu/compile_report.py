"""What every kernel becomes on GPUs that are not here: `python -m benchmarks.gpu.compile_report [--target sm_90a]`.

Compiles the kernels for several architectures, and whole steps of large models around them, and prints tables:
registers, shared memory, tensor-core and TMA instructions, launches, memory. Exits with 1 where a kernel spills
registers, waits for each of its tensor-core instructions, or is not there (XLA ran in its place), and where a step
copies the pool or a weight. Nothing is measured.
"""

import argparse
import concurrent.futures
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu import deviceless
from benchmarks.gpu.compile_cases import Case, kernels, steps
from benchmarks.gpu.report import table
from benchmarks.gpu.targets import TARGETS, Target

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "IMMA")
COPIES = ("UTMALDG", "LDGSTS")  # by the copy engine (TMA), and by threads past their registers
TEMPORARY_SHARE = 0.01  # of the pool


def kernel_rows(name: str, case: Case, target: Target) -> list[dict[str, Any]]:
    """One row a kernel of ours."""
    about = {"case": name, "target": target.architecture}
    try:
        program = deviceless.compile_for(target, case.function, *case.arguments, donate=case.donate, count=case.kernels)
    except Exception as error:  # whatever the compilers say: the other cases go on
        return [about | {"wrong": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}]
    rows = []
    for wanted in case.kernels:
        launch = next((launch for launch in program.launches if is_a(launch, wanted)), None)
        if launch is None:
            rows.append(about | {"kernel": wanted, "wrong": "not there"})
            continue
        kernel = program.kernels[launch.name]
        rows.append(
            about
            | {
                "kernel": wanted,
                "registers": kernel.registers,
                "spills": kernel.spill_bytes,
                "shared memory": launch.shared_memory,
                "tensor cores": _count(kernel, TENSOR_CORES),
                "asynchronous copies": _count(kernel, COPIES),
                "instructions": kernel.instructions.total(),
                "launches": len(program.launches),
                "wrong": _complaint(kernel, case),
            }
        )
    return rows


def _complaint(kernel: deviceless.Kernel, case: Case) -> str:
    absent = [opcode for opcode in case.opcodes if not kernel.instructions[opcode]]
    return "spills" if kernel.spills else f"has no {', '.join(absent)}" if absent else kernel.serialized


def is_a(launch: deviceless.Launch, kernel: str) -> bool:
    """Whether this is the kernel of that name; XLA numbers those of equal names."""
    return re.fullmatch(rf"{kernel}([._]\d+)*", launch.name) is not None


def _count(kernel: deviceless.Kernel, opcodes: tuple[str, ...]) -> str:
    return " ".join(f"{n} {opcode}" for opcode in opcodes if (n := kernel.instructions[opcode]))


def step_rows(name: str, case: Case, target: Target) -> list[dict[str, Any]]:
    """One row for a whole step: the pool stays where it is, nothing as large as a weight is made."""
    program = deviceless.compile_for(target, case.function, *case.arguments, donate=case.donate)
    params, pool = case.arguments[:2]
    pool_bytes, layer_bytes = _bytes(pool), min(map(_bytes, jax.tree.leaves(pool)))
    smallest = min(_bytes(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    largest = max(program.temporaries, default=0)
    memory = program.memory
    spilling = [launch for launch in set(program.kernels) if program.kernels[launch].spills]
    absent = [k for k in case.kernels if not any(is_a(launch, k) for launch in program.launches)]
    complaints = {
        "the pool is not updated in place": memory.alias_size_in_bytes < pool_bytes,
        f"temporaries above {TEMPORARY_SHARE:.0%} of the pool": memory.temp_size_in_bytes
        > TEMPORARY_SHARE * pool_bytes,
        "a temporary as large as a weight or a layer's pool": largest >= min(smallest, layer_bytes),
        f"no kernel {', '.join(absent)}": bool(absent),
        f"spills: {', '.join(sorted(spilling))}": bool(spilling),
        "loops on the host": any(launch.name == "kWhile" for launch in program.launches),
    }
    row = {
        "step": name,
        "target": target.architecture,
        "pool MiB": pool_bytes >> 20,
        "aliased MiB": memory.alias_size_in_bytes >> 20,
        "temporaries MiB": memory.temp_size_in_bytes / 2**20,
        "largest MiB": largest / 2**20,
        "smallest weight MiB": smallest / 2**20,
        "launches": len(program.launches),
        "copies": sum(launch.name == "kCopy" for launch in program.launches),
        "wrong": "; ".join(text for text, true in complaints.items() if true),
    }
    return [row]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(cases: dict[str, Case], rows_of: Callable, targets: list[Target]) -> list[dict[str, Any]]:
    """The rows of all cases on all targets that have them."""
    jobs = [
        (name, case, target)
        for name, case in cases.items()
        for target in targets
        if case.capability <= target.capability <= case.newest
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: rows_of(*job), jobs) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all of them if none is named")
    parser.add_argument("--case", default="", help="only cases that have this in their name")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if lacking := deviceless.missing():
        print(f"cannot compile without {lacking}: install the dependency group gpu-compile", file=sys.stderr)
        return 2
    deviceless.on_cpu()
    targets = [TARGETS[name] for name in args.target or TARGETS]
    tables = []
    for cases, rows_of in ((kernels, kernel_rows), (steps, step_rows)):
        chosen = {name: case for name, case in cases().items() if args.case in name}
        tables.append(report(chosen, rows_of, targets))
    text = "\n".join(line for rows in tables for line in table(rows))
    print(text)
    if args.output:
        args.output.write_text(text)
    wrong = [row for rows in tables for row in rows if row["wrong"]]
    total = sum(map(len, tables))
    print(f"{total - len(wrong)} passed, {len(wrong)} failed (jax {jax.__version__}; compiled, not run)")
    return 1 if wrong or not total else 0


if __name__ == "__main__":
    sys.exit(main())
