"""How long a step would take on a cluster: a prediction from FLOPs, bytes and link speeds.

Ranks are numbered as Megatron numbers them: neighbours share a layer, then come replicas, then
pipeline stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_mdm.config import Config, Layout, check_layout
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.accounting import (
    layer_flops_per_token,
    recomputed_flops_per_token,
    run_flops_per_token,
)
from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.costs.clusters import Cluster
from megatron_mdm.studies.costs.communication import Transfer, add_up_by_kind, step_transfers


@dataclass(frozen=True)
class StepTime:
    """Prediction for one optimizer step.

    Attributes:
        compute_seconds: Matrix products of the busiest stage, recomputation included.
        bubble_seconds: What a stage waits while the pipeline fills and empties.
        communication_seconds: By kind, in the order of `Transfer.kind`, whether hidden or not.
        hidden_seconds: Communication that goes on beside computation.
        tokens_per_second: Of the whole run.
        mfu: Model FLOPs per second, without recomputation, as a share of all GPUs' peaks.
    """

    compute_seconds: float
    bubble_seconds: float
    communication_seconds: dict[str, float]
    hidden_seconds: float
    tokens_per_second: float = 0.0
    mfu: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Duration of the step."""
        waiting = sum(self.communication_seconds.values()) - self.hidden_seconds
        return self.compute_seconds + self.bubble_seconds + waiting


def estimate_step_time(
    config: Config, cluster: Cluster, *, world_size: int, dtype: Dtype
) -> StepTime:
    """Predicts a step. The time of the optimizer's update and of loading data is left out.

    Args:
        config: A checked configuration.
        cluster: The machine.
        world_size: Number of GPUs.
        dtype: Dtype of forward and backward.

    Returns:
        The prediction for the slowest stage: m micro batches of t seconds, where t holds its
        computation and what cannot be hidden, (P - 1) t / V of bubble for P stages of V chunks,
        then gradients and weights. ZeRO-3 gathers and reduces beside computation, ZeRO-1 and 2 with
        `parallel.overlap_gradient_reduction` reduce beside it, and interleaved stages send beside
        it; of all these the cluster's `overlap` is free.

    Raises:
        ConfigError: The sizes do not divide, or do not fit the nodes.
    """
    layout = check_layout(config, world_size)
    _check_nodes(config, cluster, world_size)
    stages = config.parallel.pipeline_model_parallel_size
    # The ends of a pipeline differ from what lies between them.
    places = sorted({0, stages // 2, stages - 1})
    times = [_stage_time(config, cluster, stage, layout, dtype) for stage in places]
    slowest = max(times, key=lambda one: one.step_seconds)
    tokens = config.batch.global_batch_size * config.data.seq_length
    seconds = slowest.step_seconds
    mfu = tokens * run_flops_per_token(config) / (seconds * world_size * cluster.peak_flops(dtype))
    return replace(slowest, tokens_per_second=tokens / seconds, mfu=mfu)


def _stage_time(
    config: Config, cluster: Cluster, stage: int, layout: Layout, dtype: Dtype
) -> StepTime:
    parallel, world_size = config.parallel, layout.world_size
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    tokens = config.batch.global_batch_size * config.data.seq_length / layout.data_parallel_size
    flops = stage_flops_per_token(config, stage) * tokens / parallel.tensor_model_parallel_size
    compute = flops / (cluster.peak_flops(dtype) * cluster.efficiency)
    seconds = add_up_by_kind(
        step_transfers(config, stage, world_size=world_size, dtype=dtype),
        lambda one: transfer_seconds(one, config, cluster, world_size=world_size),
    )
    in_line = ("tensor parallel", "output layer", *(("pipeline",) if chunks == 1 else ()))
    busy = compute + sum(seconds.get(kind, 0.0) for kind in in_line)
    bubble = busy / layout.num_micro_batches * (stages - 1) / chunks
    beside: tuple[str, ...] = ("pipeline",) if chunks > 1 else ()
    if parallel.zero_stage == 3:
        beside += ("gradients", "weights")
    elif parallel.overlap_gradient_reduction:
        beside += ("gradients",)
    hidden = cluster.overlap * sum(seconds.get(kind, 0.0) for kind in beside)
    return StepTime(compute, bubble, seconds, min(hidden, compute))


def stage_flops_per_token(config: Config, stage: int) -> float:
    """FLOPs of a pipeline stage over all its tensor-parallel ranks, recomputation included.

    Args:
        config: A checked configuration.
        stage: Pipeline stage.

    Returns:
        FLOPs per token of a full window. Full recomputation adds a forward pass of the layers, a
        third; selective recomputation makes no matrix product again.
    """
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    seq_length = config.data.seq_length
    objective = build_objective(config)
    causal = objective.causal_share
    layers = model.num_layers * layer_flops_per_token(model, seq_length, causal=causal)
    layers += recomputed_flops_per_token(
        model, seq_length, causal=causal, recompute=config.parallel.recompute
    )
    flops = layers / stages
    if stage == stages - 1:
        share = objective.predicted_share(seq_length)
        flops += 6 * model.hidden_size * model.head_rows * share
    return flops


def transfer_seconds(
    transfer: Transfer, config: Config, cluster: Cluster, *, world_size: int
) -> float:
    """Time of equal collectives at the speed of the links that they take.

    Tensor-parallel ranks share a node. Replicas stand TP ranks apart; where they span nodes, those
    of one node share the ring's way out, each over a network card of its own. Stages stand TP x R
    ranks apart, on other nodes unless the whole run fits one.

    Args:
        transfer: What is sent.
        config: Gives TP.
        cluster: The machine.
        world_size: Number of GPUs.

    Returns:
        Seconds: bytes sent in the ring algorithm over the speed, and the latency of 2 ceil(log2 n)
        messages an all-reduce, ceil(log2 n) a gather or scatter, 1 a message; n - 1 where each rank
        sends to all others.
    """
    tp, nodes = config.parallel.tensor_model_parallel_size, cluster.gpus_per_node
    speed = cluster.node_bytes_per_second
    if transfer.group == "data" and transfer.num_ranks * tp > nodes:
        peers = max(nodes // tp, 1)
        speed = min(speed, peers * cluster.network_bytes_per_second)
    elif {"pipeline": world_size, "stage": transfer.num_ranks}.get(transfer.group, 0) > nodes:
        speed = min(speed, cluster.network_bytes_per_second)
    rounds = math.ceil(math.log2(transfer.num_ranks))
    known = {"all_reduce": 2 * rounds, "send": 1, "all_to_all": transfer.num_ranks - 1}
    messages = known.get(transfer.operation, rounds)
    latency = transfer.num_calls * messages * cluster.latency_seconds
    return transfer.sent_bytes / speed + latency


def _check_nodes(config: Config, cluster: Cluster, world_size: int) -> None:
    tp, nodes = config.parallel.tensor_model_parallel_size, cluster.gpus_per_node
    if world_size > nodes and world_size % nodes:
        raise ConfigError(
            f"--gpus={world_size} is not a multiple of the {nodes} GPUs of a node: use "
            f"{world_size // nodes * nodes} or {(world_size // nodes + 1) * nodes}."
        )
    if tp > nodes or nodes % tp:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={tp} does not divide the {nodes} GPUs of a node, "
            "so that layers would be split between nodes: choose a divisor."
        )
