"""Simulated layouts as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_mdm.config import check_layout
from megatron_mdm.core.tables import format_table
from megatron_mdm.studies.simulation.simulate import Simulation

_HEADS = ("Ranks", "TP", "PP", "DP", "chunks", "ZeRO", "calls", "ends", "stage", "sent GB",
          "closed form", "memory GB", "estimate")  # fmt: skip
_MAX_FAULTS = 8


def simulation_lines(simulations: Sequence[Simulation]) -> list[str]:
    """A table with a line for each stage of each layout, and what is wrong with any.

    Args:
        simulations: At least one.

    Returns:
        Lines.
    """
    rows = [row for one in simulations for row in _rows(one)]
    lines = format_table(_HEADS, rows, left=())
    for one in simulations:
        if one.faults:
            lines += ["", f"{one.world_size} ranks do not end:"]
            lines += [f"  {fault}" for fault in one.faults[:_MAX_FAULTS]]
            if len(one.faults) > _MAX_FAULTS:
                lines.append(f"  and {len(one.faults) - _MAX_FAULTS} more")
    return lines


def _rows(one: Simulation) -> list[tuple[str, ...]]:
    parallel = one.config.parallel
    layout = check_layout(one.config, one.world_size)
    head = (
        f"{one.world_size:,}",
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(layout.data_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size),
        str(parallel.zero_stage),
        f"{one.num_calls:,}",
        "no" if one.faults else "yes",
    )
    return [
        (
            *(head if not stage.stage else ("",) * len(head)),
            str(stage.stage),
            f"{sum(stage.sent_bytes.values()) / 1e9:.4f}",
            f"{sum(stage.predicted_bytes.values()) / 1e9:.4f}",
            f"{stage.memory_bytes / 1e9:.2f}",
            f"{stage.predicted_memory_bytes / 1e9:.2f}",
        )
        for stage in one.stages
    ]


def describe_simulation(one: Simulation) -> dict[str, Any]:
    """A simulated layout as JSON can hold it.

    Args:
        one: The simulation.

    Returns:
        Layout, faults in words, and bytes by stage.
    """
    return {
        "simulated": True,
        "num_gpus": one.world_size,
        "parallel": one.config.parallel.model_dump(mode="json"),
        "played_ranks": one.played,
        "num_calls": one.num_calls,
        "faults": [str(fault) for fault in one.faults],
        "stages": [asdict(stage) for stage in one.stages],
    }
