"""Compiles jitted functions to machine code for a GPU that is not there, and says what came out.

XLA does the work, from the HLO to the machine code, as it would with the GPU. A script in ptxas's place keeps what it
makes of every kernel, and nvdisasm takes that apart. Needs the dependency group `gpu-compile`.

XLA finds the script in the folder that it is told of. Kernels of Mosaic GPU and jax-triton are custom calls, which run
the ptxas that was first in PATH when they ran one first: one such function is compiled at a time.
"""

import collections
import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.gpu.targets import Target

_PTXAS = """#!/bin/sh
# Runs ptxas and keeps the machine code, with what ptxas says about it.
[ "$1" = --version ] && exec {ptxas} --version
kept=$(mktemp -d {folder}/kernel-XXXXXX)
{ptxas} -v "$@" >"$kept/words" 2>&1
code=$?
cat "$kept/words" >&2
while [ $# -gt 1 ]; do [ "$1" = -o ] && cp "$2" "$kept/cubin"; shift; done
exit $code
"""


class Kernel(NamedTuple):
    """A compiled kernel. Bytes are a thread's."""

    registers: int
    spill_bytes: int  # stored to memory and loaded back for want of registers
    stack_bytes: int
    instructions: collections.Counter  # of the machine code, by opcode; modifiers cut off
    loop: collections.Counter  # of them, those of the loop that does the work; empty without one
    serialized: str  # why ptxas makes tensor-core instructions wait for each other; empty if it doesn't

    @property
    def spills(self) -> bool:
        return bool(self.spill_bytes or self.stack_bytes)


class Launch(NamedTuple):
    """Something that the step starts on the GPU: a kernel, by its name, or "kCopy", "kWhile", ... of XLA's own.

    A kernel of a custom call is here twice: as "kCustomCall", and at the end by its name.
    """

    name: str
    grid: tuple[int, ...] = ()
    shared_memory: int | None = None  # bytes of a block of threads; None: not known


class Program(NamedTuple):
    """A function compiled for a target."""

    kernels: dict[str, Kernel]
    launches: list[Launch]
    memory: Any  # XLA's memory analysis: argument, output, alias and temp sizes in bytes
    temporaries: list[int]  # bytes of each value that is neither argument nor result


def missing() -> str | None:
    """What is not installed of what compiling needs; None: nothing."""
    for module, package in (("jax_plugins.xla_cuda13", "jax-cuda13-plugin and jax-cuda13-pjrt"), ("nvidia", "nvcc")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return package
    absent = [tool for tool in ("ptxas", "nvdisasm") if not (_tools() / tool).exists()]
    return ", ".join(absent) or None


@functools.cache
def _tools() -> Path:
    """The folder of NVIDIA's programs, as their packages install them."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return next((path for root in roots if (path := Path(root, "cu13", "bin")).is_dir()), Path("/nonexistent"))


@functools.cache
def _mesh(target: Target) -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.config(), topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("x",))


def compile_for(
    target: Target, function: Callable, *arguments: Any, donate: tuple[int, ...] = (), count: tuple[str, ...] = ()
) -> Program:
    """Compiles a function of abstract arrays (trees of `jax.ShapeDtypeStruct`) for a target.

    Args:
      count: count the instructions of kernels whose names begin so. Taking code apart takes as long as making it.

    Raises:
      jax.errors.JaxRuntimeError: XLA or ptxas refuse it (too much shared memory, an unknown instruction).
    """
    mesh = _mesh(target)
    here = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with tempfile.TemporaryDirectory(prefix="deviceless-") as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        _write_script(folder / "bin" / "ptxas", name)
        options = {
            "xla_gpu_cuda_data_dir": name,
            "xla_gpu_enable_libnvptxcompiler": False,
            "xla_dump_to": f"{name}/dump",
        }
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
            text = lowered.as_text()
            foreign = any(f"custom_call @{name}" in text for name in _CUSTOM_CALLS)
            with _foreign_kernels_kept_in(folder) if foreign else contextlib.nullcontext():
                compiled = lowered.compile(compiler_options=options)
        kernels = dict(kernel for kept in folder.glob("kernel-*") for kernel in _kernels(kept, count))
        dump = {suffix: next((folder / "dump").glob(f"*{suffix}.txt")).read_text() for suffix in _DUMPS}
    launches = _launches(dump["thunk_sequence"])
    if foreign:
        made = {name: kernel for name, kernel in kernels.items() if name not in {launch.name for launch in launches}}
        made = _MADE.setdefault((target, *re.findall(_CONFIGURATION, text)), made)
        kernels |= made
        launches += map(Launch, made)
    return Program(kernels, launches, compiled.memory_analysis(), _temporaries(dump[_BUFFERS]))


_CUSTOM_CALLS = ("mosaic_gpu", "triton_kernel_call_ffi")
"""Whose kernels XLA hands on; their names begin so."""
_CONFIGURATION = rf"custom_call @(?:{'|'.join(_CUSTOM_CALLS)}).*?(backend_config.*)"
_MADE: dict[tuple, dict[str, Kernel]] = {}
"""Kernels of custom calls by their configurations: what was made once in a process is not made again."""
_FOREIGN = threading.Lock()


@functools.cache
def _foreign_script() -> tempfile.TemporaryDirectory:
    """A folder for the rest of the process, first in PATH; the environment tells its ptxas where to keep things."""
    folder = tempfile.TemporaryDirectory(prefix="deviceless-")
    _write_script(Path(folder.name, "ptxas"), '"$DEVICELESS_KEPT"')
    os.environ["PATH"] = f"{folder.name}{os.pathsep}{os.environ['PATH']}"
    return folder


@contextlib.contextmanager
def _foreign_kernels_kept_in(folder: Path) -> Iterator[None]:
    with _FOREIGN:
        _foreign_script()
        os.environ["DEVICELESS_KEPT"] = str(folder)
        yield


def _write_script(path: Path, folder: str) -> None:
    path.write_text(_PTXAS.format(ptxas=_tools() / "ptxas", folder=folder))
    path.chmod(0o755)


_BUFFERS = "gpu_after_optimizations-buffer-assignment"
_DUMPS = ("thunk_sequence", _BUFFERS)


def _kernels(kept: Path, count: tuple[str, ...]) -> list[tuple[str, Kernel]]:
    """The kernels of one run of ptxas."""
    words = (kept / "words").read_text()
    if not (kept / "cubin").exists() or "Compiling entry function" not in words:
        return []
    entries = words.split("Compiling entry function '")[1:]
    code = ""
    if count and any(about.startswith(count) for about in entries):
        command = [_tools() / "nvdisasm", kept / "cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for about in entries:
        name = about.split("'", 1)[0]
        body = code.partition(f".section\t.text.{name},")[2].partition(".section\t")[0]
        serialized = re.search(rf"are serialized due to (.*?) in the function '{name}'", words)
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", about)[1])  # type: ignore[index]  # ptxas always says
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", about)[1])  # type: ignore[index]
        opcodes, loop = _instructions(body)
        why = serialized[1] if serialized else ""
        found.append((name, Kernel(registers, stores + loads, stack, opcodes, loop, why)))
    return found


_LINE = re.compile(r"^(?:(\.L\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)(.*))", re.MULTILINE)
_WORK = ("HMMA", "HGMMA", "IMMA", "QGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG", "FFMA")
"""Opcodes of which a loop that does the work has many."""


def _instructions(body: str) -> tuple[collections.Counter, collections.Counter]:
    """Opcodes of a function in nvdisasm's words, and those of its hottest loop: from a label to a branch back to it.

    The hottest has the most work, and of loops with equal work (one has masks) the one with fewer instructions. Loops
    around a loop that works are none of them: what waits for a barrier may stand far off and branch back from there.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for label, opcode, rest in _LINE.findall(body):
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(opcode)
        target = re.search(r"`\((\.L\w+)\)", rest)
        if opcode == "BRA" and target and target[1] in labels and labels[target[1]] < len(opcodes) - 1:
            spans.append((labels[target[1]], len(opcodes)))
    loops = {span: collections.Counter(opcodes[slice(*span)]) for span in spans}
    work = {span: sum(loop[opcode] for opcode in _WORK) for span, loop in loops.items()}
    inner = [a for a in spans if not any(work[b] and a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    hottest = max(inner, key=lambda span: (work[span], -loops[span].total()), default=None)
    return collections.Counter(opcodes), loops[hottest] if hottest else collections.Counter()


def _launches(text: str) -> list[Launch]:
    """From lines like `005: kCustomKernel [...] paged_decode grid: [98, 8, 1] threads: [...] shared_memory: 39168`."""
    launches = []
    for kind, rest in re.findall(r"^\s*\d+: (\w+)\s+\[[^]]*\](.*)$", text, re.MULTILINE):
        kernel = re.match(r" (\S+) grid: \[([^]]*)\].*shared_memory: (\d+)", rest)
        if kernel:
            launches.append(Launch(kernel[1], tuple(map(int, kernel[2].split(","))), int(kernel[3])))
        else:
            launches.append(Launch(kind))
    return launches


def _temporaries(text: str) -> list[int]:
    """Sizes of the values in the allocations that are made for the step alone."""
    found = []
    for part in text.split("\nallocation ")[1:]:
        head, _, values = part.partition("\n")
        if "preallocated-temp" in head:
            found += [int(size) for size in re.findall(r"\(size=(\d+),offset", values)]
    return found


def on_cpu() -> None:
    """To be called before JAX is used: it would look for the GPU that the plugin promises."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
