"""Memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest int, in whole pages.
_NEVER = 2**31 - 4096


def keep_freed_memory() -> bool:
    """Makes malloc keep what tensors free, for the next tensors.

    glibc gives large blocks back to the kernel as soon as they are free, and the kernel clears each
    page anew when the next pass asks for it: a quarter of a forward pass of the demo's model on
    two cores (docs/performance.md). The process stays as large as it ever was.

    Returns:
        Whether the C library has taken it; others than glibc keep their way.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
