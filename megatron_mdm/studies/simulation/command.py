"""The command that plays layouts, and what came of them as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_mdm.config import check_layout
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.tables import format_table
from megatron_mdm.studies.costs.command import EstimateSettings, list_runs, read_counts
from megatron_mdm.studies.simulation.simulate import Simulation, simulate

_HEADS = ("Ranks", "TP", "PP", "DP", "chunks", "ZeRO", "calls", "ends", "stage", "sent GB",
          "closed form", "memory GB", "estimate")  # fmt: skip
_NOTICE = (
    "Simulated: the real model and engine on tensors without values. Sent and memory: of the ranks "
    "of a stage, beside what is predicted of it on a CPU."
)
_MAX_FAULTS = 8


def describe_simulations(
    settings: EstimateSettings, overrides: Sequence[str] = ()
) -> tuple[str, bool]:
    """Plays one rank of each kind of a run's layout.

    Args:
        settings: What is asked.
        overrides: Of the configuration, `section.key=value`.

    Returns:
        A table, or JSON; and whether all ranks come to their end.

    Raises:
        ConfigError: Settings are not valid, or sizes do not divide.
    """
    if settings.best is not None:
        raise ConfigError(
            f"--best={settings.best} ranks layouts by what is predicted of them, and --simulate "
            "plays the config's own: leave one of them out."
        )
    ranks = read_counts("--ranks", settings.ranks, least=0) if settings.ranks else []
    runs, dtype = list_runs(settings, overrides)
    found = [simulate(run, gpus, dtype, ranks=ranks) for gpus, run in runs]
    ends = not any(one.faults for one in found)
    if settings.json:
        return json.dumps([simulation_to_tree(one) for one in found], indent=2), ends
    return "\n".join([_NOTICE, *format_simulations(found)]), ends


def format_simulations(simulations: Sequence[Simulation]) -> list[str]:
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


def simulation_to_tree(one: Simulation) -> dict[str, Any]:
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
