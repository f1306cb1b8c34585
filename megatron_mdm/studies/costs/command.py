"""The command that predicts runs on other machines: what is asked, and predictions as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_mdm.config import Config, check_layout, load_config
from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.options import FLATTENED, Count
from megatron_mdm.core.tables import format_table
from megatron_mdm.model.accounting import count_steps
from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.costs.clusters import Cluster, cluster_of
from megatron_mdm.studies.costs.communication import add_up_by_kind, step_transfers
from megatron_mdm.studies.costs.layouts import Estimate, best_layouts, estimate

_NOTICE = "Predicted, not measured."
_HEADS = ("GPUs", "TP", "PP", "DP", "chunks", "ZeRO", "recompute", "micro", "batch", "GB per GPU",
          "step s", "tokens/s", "MFU", "hours", "GPU hours")  # fmt: skip


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class EstimateSettings:
    """Which run, and on what.

    Attributes:
        config: YAML file of the run.
        gpus: Numbers of GPUs: N or N,N.
        best: Rank so many of the fastest layouts that fit.
        cluster: a100, h100, h200 or b200.
        samples_per_gpu: Sets batch.global_batch_size, for weak scaling.
        simulate: Play one rank of each kind through two steps of the real engine, without memory.
        ranks: Ranks to play instead: N or N,N.
        json: Print JSON.
        memory_bytes: Of a GPU, instead of the cluster's.
        bf16_flops: Dense bf16 peak of a GPU, FLOP/s, instead of the cluster's.
        fp32_flops: Float32 peak of a GPU, FLOP/s, instead of the cluster's.
        gpus_per_node: Instead of the cluster's.
        node_bytes_per_second: From a GPU to others of its node, instead of the cluster's.
        network_bytes_per_second: From a GPU to other nodes, instead of the cluster's.
        latency_seconds: Of a message; 1e-5 by default.
        efficiency: Share of the peak that computation reaches; 0.55 by default.
        overlap: Share of the communication beside computation that is free; 0.5 by default.
        memory_reserve: Share of a GPU's memory to leave free; 0.08 by default.
    """

    config: Path
    gpus: str
    best: Count | None = None
    cluster: str = "h100"
    samples_per_gpu: Count | None = None
    simulate: bool = False
    ranks: str = ""
    json: bool = False
    memory_bytes: float | None = None
    bf16_flops: float | None = None
    fp32_flops: float | None = None
    gpus_per_node: int | None = None
    node_bytes_per_second: float | None = None
    network_bytes_per_second: float | None = None
    latency_seconds: float | None = None
    efficiency: float | None = None
    overlap: float | None = None
    memory_reserve: float | None = None


def describe_run(settings: EstimateSettings, overrides: Sequence[str] = ()) -> str:
    """Predicts what a run's own layout, or the best ones, would need and take.

    Args:
        settings: What is asked.
        overrides: Of the configuration, `section.key=value`.

    Returns:
        All about a single prediction, a table of several, or JSON.

    Raises:
        ConfigError: Settings are not valid, sizes do not divide, or nothing fits.
    """
    if settings.ranks:
        raise ConfigError(
            f"--ranks={settings.ranks} says which ranks to play: add --simulate, or leave it out."
        )
    given = {field.name: getattr(settings, field.name) for field in fields(Cluster)}
    cluster = cluster_of(settings.cluster, **given)
    runs, dtype = list_runs(settings, overrides)
    estimates = list(_predict(runs, cluster, settings, dtype))
    if settings.json:
        return json.dumps([estimate_to_tree(one, dtype) for one in estimates], indent=2)
    is_alone = len(estimates) == 1
    lines = (
        format_details(estimates[0], cluster, dtype) if is_alone else format_estimates(estimates)
    )
    return "\n".join([_NOTICE, *lines])


def _predict(
    runs: Sequence[tuple[int, Config]], cluster: Cluster, settings: EstimateSettings, dtype: Dtype
) -> Iterator[Estimate]:
    for num_gpus, run in runs:
        if settings.best is None:
            yield estimate(run, cluster, world_size=num_gpus, dtype=dtype)
        else:
            yield from best_layouts(
                run, cluster, world_size=num_gpus, dtype=dtype, num_best=settings.best
            )


def list_runs(
    settings: EstimateSettings, overrides: Sequence[str]
) -> tuple[list[tuple[int, Config]], Dtype]:
    """What is asked about.

    Args:
        settings: What is asked.
        overrides: Of the configuration, `section.key=value`.

    Returns:
        Numbers of GPUs, each with the run on so many, and the dtype of forward and backward.

    Raises:
        ConfigError: The configuration or a number is not valid.
    """
    config = load_config(settings.config, overrides)
    runs = []
    for num_gpus in read_counts("--gpus", settings.gpus, least=1):
        if settings.samples_per_gpu:
            size = {"global_batch_size": settings.samples_per_gpu * num_gpus}
            config = config.model_copy(update={"batch": config.batch.model_copy(update=size)})
        runs.append((num_gpus, config))
    return runs, "fp32" if config.run.dtype == "fp32" else "bf16"


def read_counts(option: str, text: str, least: int) -> list[int]:
    """Reads whole numbers between commas; a ConfigError where one is none, or below the least."""
    numbers = text.split(",")
    if not all(one.isdecimal() and int(one) >= least for one in numbers):
        raise ConfigError(
            f"{option}={text} is not valid: give whole numbers from {least} on, such as 8,64."
        )
    return [int(one) for one in numbers]


def format_estimates(estimates: Sequence[Estimate]) -> list[str]:
    """One line a layout, under a line of names.

    Args:
        estimates: At least one.

    Returns:
        Lines.
    """
    rows = []
    for one in estimates:
        parallel, batch = one.config.parallel, one.config.batch
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            check_layout(one.config, one.world_size).data_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            parallel.zero_stage,
            parallel.recompute,
            batch.micro_batch_size,
        )
        rows.append(
            (
                f"{one.world_size:,}",
                *map(str, sizes),
                f"{batch.global_batch_size:,}",
                f"{one.memory.total_bytes / 1e9:.1f}",
                f"{one.time.step_seconds:.3f}",
                f"{one.time.tokens_per_second:,.0f}",
                f"{one.time.mfu:.1%}",
                *_format_hours(one),
            )
        )
    return format_table(_HEADS, rows, left=())


def count_hours(one: Estimate) -> float | None:
    """Hours of all steps of a run.

    Args:
        one: A prediction.

    Returns:
        None where the length is in epochs of shards that are not there.
    """
    try:
        steps = count_steps(one.config, 0, stated_samples=Fraction(0))
    except ConfigError:
        return None
    if steps < 1:
        # In epochs: the shards know how many windows there are. The engines take seconds to import.
        from megatron_mdm.training.data_plan import plan_data

        try:
            steps = plan_data(one.config).num_steps
        except MdmError:
            return None
    return steps * one.time.step_seconds / 3600


def _format_hours(one: Estimate) -> tuple[str, str]:
    hours = count_hours(one)
    if hours is None:
        return "?", "?"
    return f"{hours:.3g}", f"{hours * one.world_size:.3g}"


def format_details(one: Estimate, cluster: Cluster, dtype: Dtype) -> list[str]:
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
    parts = {name.removesuffix("_bytes"): size for name, size in asdict(memory).items()}
    seconds = {
        "computation": time.compute_seconds,
        "pipeline bubble": time.bubble_seconds,
        **time.communication_seconds,
        "of it hidden": time.hidden_seconds,
        "total": time.step_seconds,
    }
    sent = add_up_sent_bytes(one, dtype)
    verdict = (
        f"  {'fits' if one.fits else 'does not fit'} {cluster.memory_bytes / 1e9:g} GB with "
        f"{cluster.memory_reserve:.0%} left free"
    )
    return [
        *format_estimates([one]),
        "",
        "Memory of the fullest rank, GB:",
        *_figures(parts, 1e9, 3),
        *_figures({"total": memory.total_bytes}, 1e9, 3, verdict),
        "",
        "Time of a step, seconds:",
        *_figures(seconds, 1, 4),
        "",
        "Sent by a rank in a step, GB:" if sent else "Nothing is sent.",
        *_figures(sent, 1e9, 3),
    ]


def _figures(values: dict[str, float], unit: float, digits: int, note: str = "") -> list[str]:
    return [f"  {name:18} {value / unit:10.{digits}f}{note}" for name, value in values.items()]


def add_up_sent_bytes(one: Estimate, dtype: Dtype) -> dict[str, float]:
    """Bytes that a rank sends in a step.

    Args:
        one: A prediction.
        dtype: Dtype of forward and backward.

    Returns:
        By kind, of the pipeline stage that sends most of it.
    """
    most: dict[str, float] = {}
    for stage in range(one.config.parallel.pipeline_model_parallel_size):
        transfers = step_transfers(one.config, stage, world_size=one.world_size, dtype=dtype)
        for kind, size in add_up_by_kind(transfers, lambda each: each.sent_bytes).items():
            most[kind] = max(most.get(kind, 0.0), size)
    return most


def estimate_to_tree(one: Estimate, dtype: Dtype) -> dict[str, Any]:
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
        "hours": count_hours(one),
        "sent_bytes": add_up_sent_bytes(one, dtype),
    }
