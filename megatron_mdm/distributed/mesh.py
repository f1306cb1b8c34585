"""The mesh of ranks: how they are divided over named dimensions, by Megatron's process groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.distributed.cpu_backend import (
    CudaMeansCpu,
    redirect_megatron_to_cpu,
    seed_cpu_generators,
)

# Process groups by the dimensions in which their ranks differ; `tied`: the stages with tied
# weights. They are looked up each time: a group that something else holds could not be closed.
_GROUPS: dict[str, Callable[[], dist.ProcessGroup]] = {
    "dp": parallel_state.get_data_parallel_group,
    "tp": parallel_state.get_tensor_model_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "tp+dp": parallel_state.get_tensor_and_data_parallel_group,
    "tp+pp": parallel_state.get_model_parallel_group,
    "tied": parallel_state.get_embedding_group,
}


@dataclass(frozen=True)
class Dimension:
    """One dimension of the mesh, as this process sees it.

    Attributes:
        rank: This process's place along it.
        size: Ranks along it.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Is this rank the first? Of the pipeline: does it hold the input embedding?"""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Is this rank the last? Of the pipeline: does it hold the head?"""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """All ranks, and this process's place among them. Another dimension is another field.

    Attributes:
        device: Where tensors live.
        rank: Place in the world.
        world_size: Ranks in all.
        dp: Data parallel: replicas of the model.
        tp: Tensor parallel: ranks that share a layer.
        pp: Pipeline parallel: stages of layers.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dp: Dimension = Dimension()
    tp: Dimension = Dimension()
    pp: Dimension = Dimension()

    def get_group(self, name: str) -> dist.ProcessGroup:
        """Looks up a process group of this rank, within `open_mesh`.

        Args:
            name: `dp`, `tp` or `pp`: the ranks that differ in this dimension alone. `tp+dp`: those
                of this stage. `tp+pp`: those of this replica. `tied`: the first and the last
                stage, of ranks on one of them.
        """
        return _GROUPS[name]()

    def find_stage_rank(self, stage: int) -> int:
        """Place in the world of this rank's peer on another pipeline stage."""
        return dist.get_global_rank(self.get_group("pp"), stage)

    @property
    def reports_loss(self) -> bool:
        """Is this the one rank of its replica whose losses are summed over replicas?"""
        return self.pp.is_last and self.tp.is_first

    def redirect_cuda(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which code that names CUDA runs on this rank's device."""
        return CudaMeansCpu() if self.device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def open_mesh(
    parallel: ParallelConfig, device: torch.device, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Mesh]:
    """Opens the mesh: divides the ranks into Megatron's groups for the length of the context.

    Args:
        parallel: Sizes, already checked against the world.
        device: This process's device.
        timeout: How long a collective of the groups may wait for a rank.

    Yields:
        This process's place.
    """
    if device.type == "cpu":
        redirect_megatron_to_cpu()
    earlier_groups = set(_list_process_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_model_parallel_size
            if parallel.virtual_pipeline_model_parallel_size > 1
            else None
        ),
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        # Beside each group one over gloo, for optimizers of Megatron's that are not used here.
        create_gloo_process_groups=False,
    )
    groups = [group for group in _list_process_groups() if group not in earlier_groups]
    initialize_rng_tracker(force_reset=True)
    mesh = Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp=_read_dimension("dp"),
        tp=_read_dimension("tp"),
        pp=_read_dimension("pp"),
    )
    # Under sequence parallelism Megatron uses its generators even without dropout.
    seed_dropout(mesh, 0, 0, 0)
    try:
        yield mesh
    finally:
        parallel_state.destroy_model_parallel()
    # Megatron forgets its groups but leaves them open, with fifty threads over gloo. After an error
    # they stay open: closing one could wait for ranks that are gone.
    still_open = set(_list_process_groups())
    for group in groups:
        if group in still_open:
            dist.destroy_process_group(group)


def _read_dimension(name: str) -> Dimension:
    group = _GROUPS[name]()
    return Dimension(dist.get_rank(group), dist.get_world_size(group))


def _list_process_groups() -> list[dist.ProcessGroup]:
    # PyTorch has no public list of them.
    return list(dist.distributed_c10d._world.pg_map)


def seed_dropout(mesh: Mesh, seed: int, step: int, micro_batch: int, chunk: int = 0) -> None:
    """Makes dropout a function of (seed, step, micro batch, rank, chunk): no state to save.

    Args:
        mesh: This process's place.
        seed: The run's seed.
        step: Optimizer step.
        micro_batch: Micro batch of this rank within the step.
        chunk: Which of the stage's parts of the model; 0 where there is one.
    """
    stage = chunk * mesh.pp.size + mesh.pp.rank
    place = [seed, 0xD50, step, micro_batch, mesh.dp.rank, stage]
    shared = int(seed_sequence(*place).generate_state(1)[0])
    if mesh.device.type == "cpu":
        place.append(1 + mesh.tp.rank)
        seed_cpu_generators(shared, int(seed_sequence(*place).generate_state(1)[0]))
    else:
        model_parallel_cuda_manual_seed(shared, force_reset_rng=False)
