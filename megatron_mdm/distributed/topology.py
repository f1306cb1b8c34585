"""Process groups: who a rank is, from the launcher's environment to Megatron's groups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_mdm.config import ParallelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.distributed.cpu_backend import (
    CudaMeansCpu,
    redirect_megatron_to_cpu,
    seed_cpu_generators,
)
from megatron_mdm.distributed.host_memory import keep_freed_memory

# Collectives that wait longer than this mean a lost peer.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Topology:
    """This process's place.

    Attributes:
        device: Where tensors live.
        rank: Global rank.
        world_size: Ranks in all.
        tensor_rank: Place in the tensor-parallel group.
        tensor_size: Ranks a layer.
        pipeline_rank: Pipeline stage.
        pipeline_size: Pipeline stages.
        data_rank: Replica.
        data_size: Replicas.
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        """Does this rank hold the input embedding?"""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Does this rank hold the head?"""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports_loss(self) -> bool:
        """Is this the one rank of its replica whose losses are summed over replicas?"""
        return self.is_last_stage and self.tensor_rank == 0

    def cuda_redirected(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which code that names CUDA runs on this rank's device."""
        return CudaMeansCpu() if self.device.type == "cpu" else contextlib.nullcontext()


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


def launched_world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells whether this process is the one of its machine that does what is done once on each.

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


def start_process_group(
    device: torch.device, *, timeout: timedelta = _TIMEOUT, takes_device: bool = True
) -> None:
    """Joins the launcher's process group, or makes one of a single process. Idempotent.

    Args:
        device: This process's device; it decides between gloo and nccl.
        timeout: How long to wait for the other ranks, and for each of their collectives.
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
    if launched_world_size() > 1:
        _meet(backend, timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _meet(backend: str, timeout: timedelta) -> None:
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without a launcher, which is for "
            "--dry-run alone: start the run by torchrun, or unset WORLD_SIZE."
        )
    rank, world_size = int(os.environ["RANK"]), launched_world_size()
    try:
        store = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store over restarts, and with it the addresses of dead ranks.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size
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


@contextlib.contextmanager
def model_parallel(parallel: ParallelConfig, device: torch.device) -> Iterator[Topology]:
    """Divides the ranks into Megatron's groups for the length of the context.

    Args:
        parallel: Sizes, already checked against the world.
        device: This process's device.

    Yields:
        This process's place.
    """
    if device.type == "cpu":
        redirect_megatron_to_cpu()
    earlier_groups = set(_process_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_stages if parallel.virtual_pipeline_stages > 1 else None
        ),
    )
    groups = [group for group in _process_groups() if group not in earlier_groups]
    initialize_rng_tracker(force_reset=True)
    topology = Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline_model_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )
    # Under sequence parallelism Megatron turns to its generators even where nothing is dropped.
    seed_dropout(topology, 0, 0, 0)
    try:
        yield topology
    finally:
        parallel_state.destroy_model_parallel()
    # Megatron forgets its groups but leaves them open, with fifty threads over gloo. After an error
    # they stay: to close one may mean to wait for ranks that are gone.
    still_open = set(_process_groups())
    for group in groups:
        if group in still_open:
            dist.destroy_process_group(group)


def _process_groups() -> list[dist.ProcessGroup]:
    # PyTorch has no public list of them.
    return list(dist.distributed_c10d._world.pg_map)


def seed_dropout(
    topology: Topology, seed: int, step: int, micro_batch: int, chunk: int = 0
) -> None:
    """Makes dropout a function of (seed, step, micro batch, rank, chunk): no state to save.

    Args:
        topology: This process's place.
        seed: The run's seed.
        step: Optimizer step.
        micro_batch: Micro batch of this rank within the step.
        chunk: Which of the stage's parts of the model; 0 where there is one.
    """
    stage = chunk * topology.pipeline_size + topology.pipeline_rank
    place = [seed, 0xD50, step, micro_batch, topology.data_rank, stage]
    shared = int(seed_sequence(*place).generate_state(1)[0])
    if topology.device.type == "cpu":
        place.append(1 + topology.tensor_rank)
        seed_cpu_generators(shared, int(seed_sequence(*place).generate_state(1)[0]))
    else:
        model_parallel_cuda_manual_seed(shared, force_reset_rng=False)
