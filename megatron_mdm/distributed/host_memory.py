"""Memory of the CPU: of a process that computes there, and for batches on their way to a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest int, in whole pages.
_NEVER = 2**31 - 4096


# What glibc's own thresholds, which adapt, reach after large blocks have been freed.
_LARGEST_HEAP_BLOCK = 32 << 20


def keep_freed_memory() -> bool:
    """Makes malloc keep what tensors free, for the next tensors.

    glibc gives large blocks back to the kernel as soon as they are free, and the kernel clears each
    page anew when the next pass asks for it: a quarter of a forward pass of the demo's model on
    two cores (docs/performance.md). The process stays as large as it ever was.

    Returns:
        Whether the C library took the setting; only glibc does.
    """
    return _set_thresholds(_NEVER, _NEVER)


def return_freed_memory() -> bool:
    """Undoes `keep_freed_memory`, for programs that are measured as they would run alone.

    What is free at this moment goes to the kernel. A block kept before may still serve a tensor no
    larger than itself where something in use lies above it in the heap.

    Returns:
        Whether the C library took the setting.
    """
    if not _set_thresholds(_LARGEST_HEAP_BLOCK, 2 * _LARGEST_HEAP_BLOCK):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set_thresholds(mmap_bytes: int, trim_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_bytes)) and bool(
        mallopt(_M_TRIM_THRESHOLD, trim_bytes)
    )


def choose_allocator(
    device: torch.device,
) -> Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]:
    """Chooses what makes the arrays of batches: in page-locked memory for a GPU."""
    if device.type != "cuda":
        return np.empty

    def allocate_pinned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        # From memory that cannot move the GPU copies by itself, when its earlier kernels are done.
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    return allocate_pinned
