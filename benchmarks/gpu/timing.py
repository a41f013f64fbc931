"""How things are timed: chains of calls that each take what the one before returned, waited for at the end."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SAMPLE_SECONDS = 0.03
"""A chain is made so long, so that launching and waiting do not count."""
SAMPLES = 7


def rehearse() -> None:
    """From now on everything is called a few times only: nothing is measured."""
    global SAMPLE_SECONDS, SAMPLES
    SAMPLE_SECONDS, SAMPLES = 0.0, 1


def seconds(
    call: Callable[[Any], Any], state: Any, wait: Callable[[Any], Any] = jax.block_until_ready
) -> tuple[float, Any]:
    """(median seconds of one `call`, last state). `call` maps a state to the next one, which it may donate.

    Args:
      wait: returns a state when it is there.
    """
    state = wait(call(state))  # compiles
    state = wait(call(state))
    start = time.perf_counter()
    state = wait(call(state))
    once = time.perf_counter() - start
    count = min(max(round(SAMPLE_SECONDS / once), 1), 200)
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(count):
            state = call(state)
        wait(state)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times), state


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes/s of a copy from device memory to device memory, read and written bytes both counted."""
    data = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    elapsed, _ = seconds(jax.jit(jnp.copy), data)
    return 2 * data.nbytes / elapsed


def matmul_flops(size: int, dtype) -> float:
    """FLOP/s of a square matrix product."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    b = jax.random.normal(jax.random.key(1), (size, size), dtype) * size**-0.5  # a chain neither grows nor vanishes
    elapsed, _ = seconds(jax.jit(lambda x: x @ b), a)
    return 2 * size**3 / elapsed
