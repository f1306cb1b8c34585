"""Where benchmarks compute: device and dtype, and clocks that wait for them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.processes import resolve_device

# How often calls are timed, and how many of them at once: a GPU's host runs ahead of it, as in
# training, where the next layer need not wait for the last.
_TIMED = {"cpu": (3, 1), "cuda": (5, 10)}


def choose_device(name: str) -> torch.device:
    """Chooses the device of `--device`; a ConfigError where there is none such."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device=cuda needs a GPU, but PyTorch sees none: use --device=cpu, or install a CUDA "
            "build of PyTorch and check nvidia-smi."
        )
    return resolve_device(name)


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def now(device: torch.device) -> float:
    """Seconds on a clock that stands still until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_calls(call: Callable[[], object], device: torch.device) -> float:
    """Times a call: median seconds of a few, after one that pays for memory and kernels."""
    call()
    timings, calls = _TIMED[device.type]
    seconds = []
    for _ in range(timings):
        start = now(device)
        for _ in range(calls):
            call()
        seconds.append((now(device) - start) / calls)
    return statistics.median(seconds)
