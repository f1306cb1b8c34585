"""Who this process is: its device, and the launcher's process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.host_memory import keep_freed_memory

# Ranks and collectives that are waited for longer than this mean a lost peer.
_TIMEOUT = timedelta(minutes=30)
# A collective gives up after the watchdog, which says which ranks are missing, and never before.
_MARGIN = timedelta(minutes=5)
_FOR_EVER = timedelta(days=365)


def resolve_device(name: str) -> torch.device:
    """The device of this process.

    Args:
        name: `auto`, `cpu` or `cuda`.

    Returns:
        The CPU, or the GPU of this local rank.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def read_world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Is this process the one of its machine that does what each machine does once?

    Args:
        environment: Variables of the process, after `adopt_launch`.

    Returns:
        True for a process without a launcher, and for one of the ranks of a machine. A launcher
        within another may have a machine on which none says so, or several.
    """
    # Where SLURM binds a GPU to each task, all have the local rank 0.
    return (
        environment.get("LOCAL_RANK", "0") == "0" and environment.get("SLURM_LOCALID", "0") == "0"
    )


def choose_collective_timeout(hang_timeout_seconds: float | None) -> timedelta:
    """How long a collective may wait for other ranks.

    Args:
        hang_timeout_seconds: `faults.hang_timeout_seconds`, after which the watchdog ends the run.

    Returns:
        More than that, and 30 minutes at least.
    """
    if hang_timeout_seconds is None:
        return _FOR_EVER
    return max(_TIMEOUT, timedelta(seconds=hang_timeout_seconds)) + _MARGIN


def order_kernels(tensor_parallel_size: int) -> None:
    """Lets tensor-parallel ranks begin to send gradients before their next matrix product.

    To be called before this process uses its GPU. With several queues the product may take all of
    the GPU first, up to Hopper; a value that is set already stays.

    Args:
        tensor_parallel_size: Ranks that share a layer.

    Source:
        Megatron-Core, `linear_with_grad_accumulation_and_async_allreduce`.
    """
    if tensor_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def wait_for_ranks(device: torch.device) -> None:
    """Waits until every rank has come here.

    Args:
        device: This process's device.
    """
    # nccl would guess the device, and PyTorch warn of it.
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def start_process_group(
    device: torch.device,
    *,
    timeout: timedelta = _TIMEOUT,
    collective_timeout: timedelta | None = None,
    takes_device: bool = True,
) -> None:
    """Joins the launcher's process group, or makes one of a single process. Idempotent.

    Args:
        device: This process's device; it decides between gloo and nccl.
        timeout: How long to wait for the other ranks.
        collective_timeout: How long for each of their collectives; None: as long.
        takes_device: Whether this process will compute there.

    Raises:
        ConfigError: This process has no rank, or the port of the first one is taken.
    """
    if device.type == "cuda" and takes_device:
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if read_world_size() > 1:
        _meet(backend, timeout, collective_timeout or timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def join_process_group(device: torch.device) -> Iterator[None]:
    """`start_process_group` for the length of a context, unless the process is in one already."""
    if dist.is_initialized():
        yield
        return
    start_process_group(device)
    try:
        yield
    finally:
        leave_process_group()


def leave_process_group() -> None:
    """Leaves the group of `start_process_group`, and takes back what DeepSpeed was told."""
    dist.destroy_process_group()
    # Other libraries take it for a launcher's, which would have set more.
    if "WORLD_SIZE" not in os.environ and os.environ.get("LOCAL_RANK") == "0":
        del os.environ["LOCAL_RANK"]


def _meet(backend: str, timeout: timedelta, collective_timeout: timedelta) -> None:
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without a launcher, which is for "
            "--dry-run alone: start the run by torchrun, or unset WORLD_SIZE."
        )
    rank, world_size = int(os.environ["RANK"]), read_world_size()
    try:
        store = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store over restarts, and with it the addresses of dead ranks.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(
            backend, timeout=collective_timeout, store=store, rank=rank, world_size=world_size
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        taken = ConfigError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is in use on this machine: set "
            "MASTER_PORT to a free port, the same for all ranks."
        )
        taken.rank = rank
        raise taken from None
