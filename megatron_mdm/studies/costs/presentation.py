"""Predictions as text and as what JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_mdm.config import check_layout
from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.costs.clusters import Cluster
from megatron_mdm.studies.costs.communication import step_transfers
from megatron_mdm.studies.costs.layouts import Estimate

NOTICE = "Predicted, not measured."
_COLUMNS = (
    "GPUs",
    "TP",
    "PP",
    "DP",
    "chunks",
    "ZeRO",
    "recompute",
    "micro",
    "batch",
    "GB a GPU",
    "step s",
    "tokens/s",
    "MFU",
)


def table_lines(estimates: Sequence[Estimate]) -> list[str]:
    """One line a layout, under a line of names.

    Args:
        estimates: At least one.

    Returns:
        Lines of equal width.
    """
    rows = [_COLUMNS, *(_row(one) for one in estimates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def detail_lines(one: Estimate, cluster: Cluster, dtype: Dtype) -> list[str]:
    """All that is predicted of a layout.

    Args:
        one: The prediction.
        cluster: The machine.
        dtype: Dtype of forward and backward.

    Returns:
        Its line of the table, memory of the fullest rank by part, and the slowest stage's time and
        bytes sent by kind.
    """
    memory, time = one.memory, one.time
    facts = [(name.removesuffix("_bytes"), size) for name, size in asdict(memory).items()]
    lines = [*table_lines([one]), "", "Memory of the fullest rank, GB:"]
    lines += [f"  {name:18} {size / 1e9:10.3f}" for name, size in facts]
    verdict = "fits" if one.fits else "does not fit"
    room = f"{cluster.memory_bytes / 1e9:g} GB with {cluster.memory_reserve:.0%} left free"
    lines += [
        f"  {'total':18} {memory.total_bytes / 1e9:10.3f}  {verdict} {room}",
        "",
        "Time of a step, seconds:",
        f"  {'computation':18} {time.compute_seconds:10.4f}",
        f"  {'pipeline bubble':18} {time.bubble_seconds:10.4f}",
    ]
    lines += [f"  {kind:18} {spent:10.4f}" for kind, spent in time.communication_seconds.items()]
    lines += [f"  {'of it hidden':18} {time.hidden_seconds:10.4f}"]
    lines += [f"  {'total':18} {time.step_seconds:10.4f}", ""]
    sent = sent_bytes(one, dtype)
    lines += ["Sent by a rank in a step, GB:" if sent else "Nothing is sent."]
    return lines + [f"  {kind:18} {size / 1e9:10.3f}" for kind, size in sent.items()]


def sent_bytes(one: Estimate, dtype: Dtype) -> dict[str, float]:
    """Bytes that a rank sends in a step.

    Args:
        one: A prediction.
        dtype: Dtype of forward and backward.

    Returns:
        By kind, of the pipeline stage that sends most of it.
    """
    most: dict[str, float] = {}
    for stage in range(one.config.parallel.pipeline_model_parallel_size):
        sums: dict[str, float] = {}
        transfers = step_transfers(one.config, stage, world_size=one.world_size, dtype=dtype)
        for transfer in transfers:
            sums[transfer.kind] = sums.get(transfer.kind, 0.0) + transfer.sent_bytes
        for kind, size in sums.items():
            most[kind] = max(most.get(kind, 0.0), size)
    return most


def as_plain(one: Estimate, dtype: Dtype) -> dict[str, Any]:
    """A prediction as JSON can hold it.

    Args:
        one: The prediction.
        dtype: Dtype of forward and backward.

    Returns:
        Layout, bytes and seconds.
    """
    layout = check_layout(one.config, one.world_size)
    return {
        "predicted": True,
        "num_gpus": one.world_size,
        "data_parallel_size": layout.data_parallel_size,
        "num_micro_batches": layout.num_micro_batches,
        "micro_batch_size": one.config.batch.micro_batch_size,
        "global_batch_size": one.config.batch.global_batch_size,
        "parallel": one.config.parallel.model_dump(mode="json"),
        "fits": one.fits,
        "memory": {**asdict(one.memory), "total_bytes": one.memory.total_bytes},
        "time": {**asdict(one.time), "step_seconds": one.time.step_seconds},
        "sent_bytes": sent_bytes(one, dtype),
    }


def _row(one: Estimate) -> tuple[str, ...]:
    parallel, batch = one.config.parallel, one.config.batch
    replicas = check_layout(one.config, one.world_size).data_parallel_size
    return (
        f"{one.world_size:,}",
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(replicas),
        str(parallel.virtual_pipeline_stages),
        str(parallel.zero_stage),
        parallel.recompute,
        str(batch.micro_batch_size),
        f"{batch.global_batch_size:,}",
        f"{one.memory.total_bytes / 1e9:.1f}",
        f"{one.time.step_seconds:.3f}",
        f"{one.time.tokens_per_second:,.0f}",
        f"{one.time.mfu:.1%}",
    )
