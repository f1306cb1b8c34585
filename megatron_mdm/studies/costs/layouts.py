"""Which layouts of a run fit a cluster, and which of them would be fastest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mdm.config import Config, check_layout
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.memory import Dtype, MemoryEstimate, estimate_memory
from megatron_mdm.studies.costs.clusters import Cluster
from megatron_mdm.studies.costs.step_time import StepTime, estimate_step_time

_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Estimate:
    """What a layout needs and takes.

    Attributes:
        config: The run under this layout.
        world_size: Number of GPUs.
        memory: Of the fullest rank.
        time: Of a step.
        fits: Does the memory leave the cluster's reserve free?
    """

    config: Config
    world_size: int
    memory: MemoryEstimate
    time: StepTime
    fits: bool


def estimate(config: Config, cluster: Cluster, *, world_size: int, dtype: Dtype) -> Estimate:
    """Predicts memory and time of the layout of a configuration.

    Args:
        config: A checked configuration.
        cluster: The machine.
        world_size: Number of GPUs.
        dtype: Dtype of forward and backward.

    Returns:
        The prediction.

    Raises:
        ConfigError: The sizes do not divide, or do not fit the nodes.
    """
    memory = estimate_memory(config, world_size=world_size, dtype=dtype)
    time = estimate_step_time(config, cluster, world_size=world_size, dtype=dtype)
    room = cluster.memory_bytes * (1 - cluster.memory_reserve)
    return Estimate(config, world_size, memory, time, memory.total_bytes <= room)


def best_layouts(
    config: Config, cluster: Cluster, *, world_size: int, dtype: Dtype, num_best: int
) -> list[Estimate]:
    """Ranks the layouts that fit.

    Tried are all divisions of the ranks with TP inside a node, all ZeRO stages and kinds of
    recomputation, up to four chunks per stage, and micro batches of powers of two; with sequence
    parallelism wherever TP is above 1.

    Args:
        config: A checked configuration; its `parallel` and micro batch are replaced.
        cluster: The machine.
        world_size: Number of GPUs.
        dtype: Dtype of forward and backward.
        num_best: How many to return.

    Returns:
        The fastest first; of equally fast ones those that make less again, then those with most
        memory to spare.

    Raises:
        ConfigError: No layout is valid, or none fits.
    """
    estimates = [
        estimate(candidate, cluster, world_size=world_size, dtype=dtype)
        for candidate in _candidates(config, cluster, world_size, dtype)
    ]
    if not estimates:
        raise ConfigError(
            f"No layout divides --gpus={world_size} and "
            f"batch.global_batch_size={config.batch.global_batch_size}: choose a number of GPUs "
            "that divides the batch times the model's heads."
        )
    fitting = [one for one in estimates if one.fits]
    if not fitting:
        least = min(one.memory.total_bytes for one in estimates)
        raise ConfigError(
            f"No layout fits {world_size} GPUs of {cluster.memory_bytes / 1e9:g} GB with "
            f"{cluster.memory_reserve:.0%} left free; the smallest takes {least / 1e9:.1f} GB: use "
            "more or larger GPUs."
        )
    fitting.sort(key=_rank)
    return fitting[:num_best]


def _rank(one: Estimate) -> tuple[float, int, int]:
    recompute = _RECOMPUTE.index(one.config.parallel.recompute)
    return one.time.step_seconds, recompute, one.memory.total_bytes


def _candidates(
    config: Config, cluster: Cluster, world_size: int, dtype: Dtype
) -> Iterator[Config]:
    tensor_sizes = _divisors(min(cluster.gpus_per_node, world_size))
    # bf16 needs ZeRO for its fp32 master weights.
    zero_stages = (1, 2, 3) if dtype == "bf16" else (0, 1, 2, 3)
    for tp, pp in itertools.product(tensor_sizes, _divisors(config.model.num_layers)):
        if world_size % (tp * pp) or cluster.gpus_per_node % tp:
            continue
        samples = config.batch.global_batch_size // (world_size // (tp * pp))
        micro_sizes = [2**power for power in range(max(samples, 1).bit_length())]
        for chunks, zero, recompute, micro in itertools.product(
            range(1, 5), zero_stages, _RECOMPUTE, micro_sizes
        ):
            parallel: dict[str, Any] = {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "sequence_parallel": tp > 1,
                "virtual_pipeline_model_parallel_size": chunks,
                "zero_stage": zero,
                "recompute": recompute,
                "overlap_gradient_reduction": (
                    config.parallel.overlap_gradient_reduction and zero in (1, 2) and pp == 1
                ),
            }
            candidate = config.model_copy(
                update={
                    "parallel": config.parallel.model_copy(update=parallel),
                    "batch": config.batch.model_copy(update={"micro_batch_size": micro}),
                }
            )
            with contextlib.suppress(ConfigError):
                check_layout(candidate, world_size)
                yield candidate


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
