"""What a machine is: its GPU, what is installed for it, and how fast matmuls and copies are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mdm.studies.benchmarks.devices import choose_device, time_calls
from megatron_mdm.studies.benchmarks.settings import EnvironmentSettings
from megatron_mdm.training.throughput import measure_matmul_flops

_OPTIONAL = ("apex", "transformer_engine", "flash_attn", "triton")
_COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}
_FILE_BYTES = {"cuda": 1 << 31, "cpu": 1 << 24}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_environment(folder: Path, settings: EnvironmentSettings) -> dict[str, Any]:
    """Describes this machine and measures its ceilings.

    Args:
        folder: An empty folder on the disk to measure.
        settings: The device.

    Returns:
        The GPU, its driver and libraries; which kernels of attention run; which optional packages
        are there; FLOP/s of matmuls on random numbers, bytes per second of copies on the device
        (read and written) and of files.
    """
    device = choose_device(settings.device)
    return {
        "device": describe_device(device),
        "packages": {name: _find_version(name) for name in _OPTIONAL},
        "attention_kernels": _list_attention_kernels(device),
        "matmul_flops_per_second": {
            name: measure_matmul_flops(device, dtype) for name, dtype in _DTYPES.items()
        },
        "copied_bytes_per_second": _measure_copy(device),
        "written_bytes_per_second": _measure_writing(folder, _FILE_BYTES[device.type]),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Names the device, and of a GPU what drives it.

    Args:
        device: A CPU or a GPU of this process.

    Returns:
        Name, memory in bytes, versions of driver and libraries; of a CPU its kind alone.
    """
    if device.type != "cuda":
        return {"kind": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _find_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "num_gpus": torch.cuda.device_count(),
        "allocator": torch.cuda.memory.get_allocator_backend(),
    }


def _find_version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _find_driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip().partition("\n")[0] or None


def _list_attention_kernels(device: torch.device) -> dict[str, bool]:
    """Which of PyTorch's kernels run forward and backward in bf16, each alone."""
    names = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found = {}
    for name, backend in names.items():
        q_BNSD = torch.randn(1, 2, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        try:
            with sdpa_kernel(backend):
                torch.autograd.backward(
                    F.scaled_dot_product_attention(q_BNSD, q_BNSD, q_BNSD).sum()
                )
            found[name] = True
        except RuntimeError:
            found[name] = False
    return found


def _measure_copy(device: torch.device) -> float:
    """Bytes read and written per second."""
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / time_calls(lambda: target.copy_(source), device)


def _measure_writing(folder: Path, num_bytes: int) -> float:
    block = torch.randint(256, (1 << 22,), dtype=torch.uint8).numpy().data
    rates = []
    for number in range(3):
        started = time.perf_counter()
        with (folder / f"{number}").open("wb") as stream:
            for _ in range(num_bytes // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        rates.append(num_bytes / (time.perf_counter() - started))
        (folder / f"{number}").unlink()
    return statistics.median(rates)
