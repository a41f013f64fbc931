"""Compiles jitted functions to machine code for a GPU that is not there, and says what came out.

XLA does the work, from the HLO to the machine code, as it would with the GPU. A script in ptxas's place keeps what it
makes of every kernel, and nvdisasm takes that apart. Needs the dependency group `gpu-compile`.
"""

import collections
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
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

    @property
    def spills(self) -> bool:
        return bool(self.spill_bytes or self.stack_bytes)


class Launch(NamedTuple):
    """Something that the step starts on the GPU: a kernel, by its name, or "kCopy", "kWhile", ... of XLA's own."""

    name: str
    grid: tuple[int, ...] = ()
    shared_memory: int = 0  # bytes of a block of threads


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


def compile_for(target: Target, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles a function of abstract arrays (trees of `jax.ShapeDtypeStruct`) for a target.

    Raises:
      jax.errors.JaxRuntimeError: XLA or ptxas refuse it (too much shared memory, an unknown instruction).
    """
    mesh = _mesh(target)
    here = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with tempfile.TemporaryDirectory(prefix="deviceless-") as name:
        folder = Path(name)
        script = folder / "bin" / "ptxas"
        script.parent.mkdir()
        script.write_text(_PTXAS.format(ptxas=_tools() / "ptxas", folder=folder))
        script.chmod(0o755)
        options = {
            "xla_gpu_cuda_data_dir": name,
            "xla_gpu_enable_libnvptxcompiler": False,
            "xla_dump_to": f"{name}/dump",
        }
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
            compiled = lowered.compile(compiler_options=options)
        kernels = dict(kernel for kept in folder.glob("kernel-*") for kernel in _kernels(kept))
        dump = {suffix: next((folder / "dump").glob(f"*{suffix}.txt")).read_text() for suffix in _DUMPS}
    return Program(kernels, _launches(dump["thunk_sequence"]), compiled.memory_analysis(), _temporaries(dump[_BUFFERS]))


_BUFFERS = "gpu_after_optimizations-buffer-assignment"
_DUMPS = ("thunk_sequence", _BUFFERS)


def _kernels(kept: Path) -> list[tuple[str, Kernel]]:
    """The kernels of one run of ptxas."""
    words = (kept / "words").read_text()
    if not (kept / "cubin").exists() or "Compiling entry function" not in words:
        return []
    command = [_tools() / "nvdisasm", kept / "cubin"]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for about in words.split("Compiling entry function '")[1:]:
        name = about.split("'", 1)[0]
        body = code.partition(f".section\t.text.{name},")[2].partition(".section\t")[0]
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)", body, re.MULTILINE)
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", about)[1])  # type: ignore[index]  # ptxas always says
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", about)[1])  # type: ignore[index]
        found.append((name, Kernel(registers, stores + loads, stack, collections.Counter(opcodes))))
    return found


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
