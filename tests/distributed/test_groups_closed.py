"""Megatron's process groups end with the context that made them."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from cases import batches_of, engine_of, stage_of

from megatron_mdm.config import ParallelConfig
from megatron_mdm.distributed.mesh import open_mesh


def threads_after_contexts(num_contexts: int) -> list[int]:
    counts = []
    for size in (1, 2) * num_contexts:
        parallel = ParallelConfig(tensor_model_parallel_size=size)
        with open_mesh(parallel, torch.device("cpu")):
            dist.barrier()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def threads_after_steps(num_contexts: int) -> list[int]:
    counts = []
    for step in range(num_contexts):
        with stage_of({}) as stage, engine_of(stage) as engine:
            mesh = stage.mesh
            batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
            engine.train_step(step, batches.read_step(step), 0.01)
        del stage, engine
        gc.collect()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def timeouts_of_groups(minutes: float) -> list[float]:
    parallel, cpu = ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu")
    with open_mesh(parallel, cpu, timedelta(minutes=minutes)) as mesh:
        groups = [mesh.get_group(name) for name in ("dp", "tp", "pp", "tp+pp")]
        return [one._get_backend(cpu).options._timeout.total_seconds() for one in groups]


def test_collectives_wait_as_long_as_they_are_told(world_of):
    assert world_of(2).run(timeouts_of_groups, minutes=92.5) == [[5550.0] * 4] * 2


def test_training_leaves_no_model_and_so_no_threads(world_of):
    for counts in world_of(2).run(threads_after_steps, num_contexts=3):
        assert counts[-1] <= counts[0]


def test_contexts_one_after_the_other_leave_no_threads(world_of):
    for counts in world_of(2).run(threads_after_contexts, num_contexts=4):
        assert counts[-1] <= counts[1]
