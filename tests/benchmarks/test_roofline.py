"""The estimates of docs/kernels.md: their arithmetic, on a kernel whose counts are known."""

import collections

from benchmarks.gpu.compile_cases import attention
from benchmarks.gpu.deviceless import Kernel
from benchmarks.gpu.roofline import estimate, loops
from benchmarks.gpu.targets import TARGETS

KERNEL = Kernel(
    registers=96,
    spill_bytes=0,
    stack_bytes=0,
    instructions=collections.Counter(),
    loop=collections.Counter(MUFU=10, FADD=90),
    serialized="",
)


def loops_of(heads, kv_heads, pool=None):
    case = attention("decode", "bfloat16", heads, kv_heads, 128, pool)
    return {loop.kernel: loop for loop in loops(heads, kv_heads, 128, *case.arguments[:2], 90)}


def test_bytes_and_rows():
    llama, opt, int8 = loops_of(32, 8), loops_of(40, 40), loops_of(32, 8, "int8")
    decode = llama["paged_decode"]
    assert decode.tile_bytes == decode.tiles.tokens * 2 * 128 * 2
    assert int8["paged_decode"].tile_bytes == decode.tiles.tokens * 2 * (128 + 4)
    assert [llama[kernel].shape.m for kernel in llama] == [16, 32, 128, 64, 128]
    assert len(int8) == 3, "Mosaic GPU's kernels read no quantised pools"
    assert (opt["paged_decode_shared"].shape.m, opt["paged_prefill"].shape.queries) == (16, 128)
    assert (llama["paged_prefill"].readers, opt["paged_prefill"].readers) == (16, 4)


def test_cycles_and_what_limits():
    target = TARGETS["sm_90a"]
    decode = loops_of(32, 8)["paged_decode"]
    row = estimate(decode, KERNEL, 40000, target)
    per_cycle = target.bandwidth / target.multiprocessors / (target.clock_ghz * 1e9)
    assert row["memory"] == round(decode.tile_bytes / per_cycle)
    assert row["tensor"] == 4 * 16 * decode.tiles.tokens * 128 // 4096
    assert (row["special"], row["issue"]) == (10 * 4 * 2, 100)
    assert (row["rows"], row["limit"], row["at most"]) == ("4 of 16", "memory", "100%")
    assert row["programs"] == 5, "shared memory for five, registers for as many"
    slow = estimate(decode, KERNEL._replace(loop=collections.Counter(FADD=4 * row["memory"])), 40000, target)
    assert (slow["limit"], slow["at most"]) == ("issue", "25%")
