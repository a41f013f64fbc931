"""What limits the attention kernels, from counts: `python -m benchmarks.gpu.roofline [--target sm_90a]`.

Of each kernel's loop over tiles of cached tokens, the cycles of a multiprocessor that each resource needs for one tile
of one program, as if it were the only one:

    memory     bytes of keys, values and scales, at a multiprocessor's share of the bandwidth; programs that compute a
               prompt read the same blocks, once from memory, then from the L2 cache: divided among those of 512 queries
    tensor     operations of both products, padding rows included, at the tensor cores' rate on the data sheet
    special    MUFU instructions (exponentials), 16 a cycle
    issue      all instructions, one a cycle by each of four schedulers

Bytes and operations are counted from the shapes, instructions in the machine code, compiled without a GPU. The largest
is the limit. "at most" is what is left then: of the bandwidth where rows decode, of the tensor cores (real rows only)
where prompts are computed. Nothing is measured: waiting (latency, barriers, what is not overlapped) is not in it.
"""

import argparse
import sys
from typing import Any, NamedTuple

import jax

from benchmarks.gpu import deviceless
from benchmarks.gpu.compile_cases import MEMBERS, attention, tile_size
from benchmarks.gpu.report import table
from benchmarks.gpu.targets import TARGETS, Target
from pallas_kernels.paged_attention import QuantizedKV, pool_values
from pallas_kernels.paged_attention.mosaic_softmax import ROWS, TILE_TOKENS
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.tiles import Tiles, decode_tiles, prefill_tiles
from pallas_kernels.paged_attention.triton_softmax import Shape, shape_of

CHUNK = 512
"""Queries of one prompt that are computed in one step."""
LATENCY = 0.7e-6
"""Seconds from asking memory to having it, on an H100."""
MOSAIC = {  # tiles of Mosaic GPU's kernels (a wgmma is 64 rows high), and their shared memory at a head size of 128
    "paged_decode_mosaic_gpu_kernel": (Tiles(rows=ROWS, tokens=TILE_TOKENS, num_warps=4, num_stages=3), 152 << 10),
    "paged_prefill_mosaic_gpu_kernel": (Tiles(rows=2 * ROWS, tokens=TILE_TOKENS, num_warps=8, num_stages=3), 145 << 10),
}


class Loop(NamedTuple):
    """A kernel's work on one tile."""

    kernel: str
    shape: Shape
    tiles: Tiles
    head_size: int
    tile_bytes: int
    readers: int
    """Programs that read the same tile at about the same time."""


CASES: dict[str, tuple[str, int, int, int, str | None]] = {  # dtype, heads, KV heads, head size, quantised pool
    "Llama-3-8B, 32/8": ("bfloat16", 32, 8, 128, None),
    "Llama-3-8B, int8 pool": ("bfloat16", 32, 8, 128, "int8"),
    "Llama-3-70B, 64/8": ("bfloat16", 64, 8, 128, None),
    "OPT-13B, 40/40": ("bfloat16", 40, 40, 128, None),
}


def loops(heads: int, kv_heads: int, size: int, q: jax.ShapeDtypeStruct, kv: Any, capability: int) -> list[Loop]:
    """The loops of the three attention kernels."""
    values = pool_values(kv)
    token = 2 * (size * values.dtype.itemsize + (4 if isinstance(kv, QuantizedKV) else 0))
    decode, prefill = decode_tiles(size, q.dtype.itemsize), prefill_tiles(size, q.dtype.itemsize, capability)
    options = Options(scale=1.0)
    kinds: list[tuple[str, Tiles, int]] = [
        ("paged_decode", decode, 1),
        ("paged_decode_shared", decode, MEMBERS),
        ("paged_prefill", prefill, tile_size(heads, kv_heads)),
    ]
    if values is kv and capability == 90:
        queries_of = (1, tile_size(heads, kv_heads))
        kinds += [(name, tiles, n) for (name, (tiles, _)), n in zip(MOSAIC.items(), queries_of, strict=True)]
    made = []
    for name, tiles, queries in kinds:
        shape = shape_of(q, kv, tiles, queries, options)
        if name in MOSAIC:
            shape = shape._replace(m=tiles.rows)
        readers = CHUNK // shape.queries * shape.group_parts if "prefill" in name else 1
        made.append(Loop(name, shape, tiles, size, token * tiles.tokens, readers))
    return made


def estimate(loop: Loop, kernel: deviceless.Kernel, shared_memory: int, target: Target) -> dict[str, Any]:
    """A row of the table."""
    shape, tiles, clock = loop.shape, loop.tiles, target.clock_ghz * 1e9
    threads, warps, rows = 32 * tiles.num_warps, tiles.num_warps, shape.queries * shape.heads
    share = target.bandwidth / target.multiprocessors / clock  # bytes of a multiprocessor in a cycle
    products = 4 * shape.m * tiles.tokens * loop.head_size
    cycles = {
        "memory": loop.tile_bytes / loop.readers / share,
        "tensor": products / target.tensor_rate,
        "special": kernel.loop["MUFU"] * warps * 32 / 16,
        "issue": kernel.loop.total() * warps / 4,
    }
    limit = max(cycles, key=cycles.__getitem__)
    programs = min(
        65536 // (-(-kernel.registers // 8) * 8 * threads),
        target.shared_memory // (shared_memory + 1024),
        2048 // threads,
    )
    useful = cycles["tensor"] * rows / shape.m if "prefill" in loop.kernel else cycles["memory"]
    return {
        "rows": f"{rows} of {shape.m}",
        "KiB a tile": loop.tile_bytes / 1024,
        "programs": programs,
        "KiB in flight": programs * (tiles.num_stages - 1) * loop.tile_bytes / 1024,
        "wanted": target.bandwidth * LATENCY / target.multiprocessors / 1024,
        **{name: round(count) for name, count in cycles.items()},
        "limit": limit,
        "at most": f"{useful / cycles[limit]:.0%}",
    }


def rows_of(name: str, target: Target) -> list[dict[str, Any]]:
    """The kernels of one model on one GPU."""
    dtype, heads, kv_heads, size, pool = CASES[name]
    kinds = [("decode", "triton"), ("prefill", "triton")]
    if target.capability == (9, 0) and pool is None:
        kinds += [("decode", "mosaic"), ("prefill", "mosaic")]
    rows: list[dict[str, Any]] = []
    for operation, implementation in kinds:
        shared, by_name = implementation == "triton", {"implementation": implementation}
        case = attention(operation, dtype, heads, kv_heads, size, pool, shared=shared, **by_name)
        program = deviceless.compile_for(target, case.function, *case.arguments, count=case.kernels)
        shared_memory = {launch.name: launch.shared_memory for launch in program.launches}
        for loop in loops(heads, kv_heads, size, *case.arguments[:2], 10 * target.capability[0]):
            if loop.kernel in case.kernels:
                kernel = program.kernels[loop.kernel]
                memory = MOSAIC[loop.kernel][1] if loop.kernel in MOSAIC else shared_memory[loop.kernel]
                about = {"kernel": loop.kernel, "model": name, "target": target.architecture}
                rows.append(about | estimate(loop, kernel, memory, target))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all of them if none is named")
    parser.add_argument("--case", default="", help="only models that have this in their name")
    args = parser.parse_args()
    if lacking := deviceless.missing():
        print(f"cannot compile without {lacking}: install the dependency group gpu-compile", file=sys.stderr)
        return 2
    deviceless.on_cpu()
    targets = [TARGETS[name] for name in args.target or TARGETS]
    rows = [row for target in targets for name in CASES if args.case in name for row in rows_of(name, target)]
    print("\n".join(table(sorted(rows, key=lambda row: row["kernel"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
