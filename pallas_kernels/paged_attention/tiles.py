"""Tile shapes of the GPU kernels: what is worked on at once, by how many warps, how far ahead it is loaded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one program of an attention kernel works."""

    rows: int
    """Rows of a product, at most: query heads of a KV head, times queries."""
    tokens: int
    """Cached tokens in a tile. A power of two."""
    num_warps: int
    num_stages: int
    """Tiles in flight, the one that is worked on included."""
    programs: int = 132 * 4
    """Programs that a decode kernel wants: a few for each multiprocessor, so that the last ones to end are small."""


def decode_tiles(head_size: int, itemsize: int) -> Tiles:
    """Tiles of decode attention, where only bytes in flight count.

    An H100 has to have about 20 KB in flight in each of its 132 multiprocessors to use its bandwidth (3.35 TB/s times
    0.7 us of latency), an H200 about 26. A tile is 16 KB of keys and as much of values where a token has 256 bytes; two
    stages ahead are 64 KB a program, and two to three programs fit the 228 KB of shared memory.
    """
    tokens = 16384 // (_padded(head_size) * itemsize)
    return Tiles(rows=64, tokens=min(max(tokens, 16), 128), num_warps=4, num_stages=3)


def prefill_tiles(head_size: int, itemsize: int, capability: int) -> Tiles:
    """Tiles of prefill attention, where tensor cores count: 128 rows are two warp groups of 64, the wgmma's height.

    The output of 128 x 128 in float32 takes 64 registers of each of 256 threads and the scores of 64 tokens 32 more.
    With a head size of 256 half the rows keep the output in registers. Two stages on Hopper, because with three ptxas
    waits for each wgmma ("instructions are serialized"), at the same shared memory; elsewhere three, because with two
    some shapes spill. Fewer tokens where jax 0.11's Triton spills: on Ampere, which has no memory for its tensor cores'
    results, and with a head size of 256 on Blackwell.
    """
    if itemsize == 4:  # exact float32 products run on no tensor core
        return Tiles(rows=32, tokens=16, num_warps=4, num_stages=2)  # larger ones spill registers
    stages = 2 if capability == 90 else 3
    if head_size > 128:
        return Tiles(rows=64, tokens=16 if capability >= 100 else 32, num_warps=8, num_stages=stages)
    return Tiles(rows=128, tokens=32 if capability < 90 else 64, num_warps=8, num_stages=stages)


def _padded(head_size: int) -> int:
    return 1 << (head_size - 1).bit_length()
