"""Which implementation runs where: docs/kernels.md's table is what the code chooses; what falls back says so."""

import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Device
from pallas_kernels.paged_attention import QuantizedKV, paged_decode_attention, pool_shape

DEVICES = {
    "CPU": Device("cpu", 0),
    "8.0 (A100)": Device("cuda", 80),
    "8.9 (L4)": Device("cuda", 89),
    "9.0 (H100, H200)": Device("cuda", 90),
    "10.0 (B200)": Device("cuda", 100),
}
ATTENTION = ("paged_decode_attention", "paged_prefill_attention")
MOVES = ("copy_blocks", "gather_blocks", "scatter_blocks")


def pool(dtype="bfloat16", size=128, parts=2):
    shape = pool_shape(100, 16, 2, size, parts)
    kv = jax.ShapeDtypeStruct(shape, dtype)
    return QuantizedKV(kv, jax.ShapeDtypeStruct(shape[:-1], "float32")) if kv.dtype.itemsize == 1 else kv


def attention(kv, queries="bfloat16"):
    values = kv.values if isinstance(kv, QuantizedKV) else kv
    return jax.ShapeDtypeStruct((4, 8, values.shape[-1]), queries), kv


ROWS = [
    *((dtype, ATTENTION, attention(pool(dtype), dtype)) for dtype in ("float32", "bfloat16", "float16")),
    *((f"{dtype} pool", ATTENTION, attention(pool(dtype))) for dtype in ("int8", "float8_e4m3fn")),
    ("head size 72", ATTENTION, attention(pool(size=72))),
    ("keys that are values (MLA)", ATTENTION, attention(pool(parts=1))),
    ("any pool", MOVES, (pool(),)),
]


def table(asked):
    lines = [f"| operation | arrays | {' | '.join(DEVICES)} |", "|" + "---|" * (2 + len(DEVICES))]
    for arrays, operations, arguments in ROWS:
        found = {}
        for operation in operations:
            package = "pallas_kernels." + ("paged_attention" if operation in ATTENTION else "block_copy")
            choose = functools.partial(dispatch.choose, package, operation, asked, *arguments)
            cells = " | ".join(f"`{choose(device=device)[0]}`" for device in DEVICES.values())
            found.setdefault(cells, []).append(f"`{operation}`")
        lines += [f"| {', '.join(names)} | {arrays} | {cells} |" for cells, names in found.items()]
    return "\n".join(lines)


def test_the_table_in_the_documentation(monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert table("auto") in text, f"docs/kernels.md should say\n\n{table('auto')}\n"


def traced_for(kind, dtype):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    aval, (q, kv) = jax.ShapeDtypeStruct, attention(pool(dtype))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        decode = functools.partial(paged_decode_attention, scale=0.1)
        jax.jit(decode).trace(q, kv, aval((4, 8), "int32"), aval((4,), "int32"))


def test_what_a_gpu_has_no_kernel_for_is_told(monkeypatch):
    monkeypatch.delenv("JPAGED_KERNELS", raising=False)
    with pytest.warns(UserWarning, match="runs in XLA, which is slower: the kernel reads float8_e4m3fn from"):
        traced_for("NVIDIA A100-SXM4-80GB", "float8_e4m3fn")
    monkeypatch.setenv("JPAGED_KERNELS", "xla")  # which says that one knows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced_for("NVIDIA A100-SXM4-80GB", "float8_e4m3fn")


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is installed")
def test_jax_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("JPAGED_KERNELS", "jax_triton")
    with pytest.raises(dispatch.Unsupported, match="in jax_triton needs the package jax-triton"):
        traced_for("NVIDIA H200", "bfloat16")


def test_jax_triton_that_cannot_be_imported(monkeypatch):
    """It wants a jax of certain versions."""
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.delitem(sys.modules, "pallas_kernels.paged_attention.jax_triton_kernel", raising=False)
    with pytest.raises(ImportError, match="leave the implementation to be chosen"):
        importlib.import_module("pallas_kernels.paged_attention.jax_triton_kernel")
