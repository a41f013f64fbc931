"""How the process keeps the memory that XLA's CPU steps allocate and free."""

import ctypes
import sys

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory instead of returning it to the operating system. True if that was possible.

    XLA:CPU allocates a step's temporary buffers anew at every step. As glibc comes, anything large is mapped and
    unmapped each time, and every page is faulted in and zeroed again: half of the time of a decode step's attention
    (docs/performance.md). Only glibc has these knobs; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP) and mallopt(_M_TRIM_THRESHOLD, _KEEP) and mallopt(_M_ARENA_MAX, 1))
