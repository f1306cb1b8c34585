"""Where the time of a training step goes: kernels, the operators that called them, and gaps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import join_process_group
from megatron_mdm.studies.benchmarks.devices import now
from megatron_mdm.studies.benchmarks.settings import ProfileSettings
from megatron_mdm.studies.benchmarks.training import make_config
from megatron_mdm.studies.benchmarks.training_cases import CASES
from megatron_mdm.training.plan import choose_device, choose_dtype

_MICROSECOND = 1e-6
_LARGEST = 10
_NAME_LENGTH = 160


def profile_training(settings: ProfileSettings) -> dict[str, Any]:
    """Profiles steps of our training, after some that pay for memory and compilation.

    Args:
        settings: What is trained.

    Returns:
        Seconds per step with and without the profiler; of the device the share of the time in
        which no kernel ran (the host was late), `kernels`, the most expensive first with calls per
        step, milliseconds per step and share of all kernels, and `operators`, what called them. On
        a CPU operators alone.
    """
    config = make_config(settings)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        join_process_group(device),
        open_mesh(config.parallel, device) as mesh,
        CASES["ours"](config, mesh, dtype) as case,
    ):
        for _ in range(settings.warm_up_steps):
            case.step()
        plain_seconds = _time_steps(case.step, settings.steps, device)
        with profile(activities=activities) as profiler:
            seconds = _time_steps(case.step, settings.steps, device)
    kernels = describe_kernels(profiler.events(), settings.steps, seconds)
    return {
        "step_seconds": plain_seconds / settings.steps,
        "profiled_step_seconds": seconds / settings.steps,
        **kernels,
        "operators": _list_operators(profiler, settings.steps, bool(kernels)),
    }


def _time_steps(step: Any, count: int, device: torch.device) -> float:
    started = now(device)
    for _ in range(count):
        step()
    return now(device) - started


def describe_kernels(events: Iterable[Any], steps: int, seconds: float) -> dict[str, Any]:
    """Describes where a device's time went.

    Args:
        events: Of PyTorch's profiler.
        steps: Training steps that were profiled.
        seconds: That they took.

    Returns:
        As `profile_training`; nothing without kernels.
    """
    # Ranges that the host names are drawn on the device too, over the kernels within.
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:
        return {}
    found: dict[str, Any] = {}
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy = _cover(spans)
    found["idle_share"] = max(0.0, 1 - busy * _MICROSECOND / seconds)
    found["largest_gaps_milliseconds"] = [round(gap / 1e3, 4) for gap in _find_gaps(spans)]
    times: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        times[event.name].append(event.time_range.end - event.time_range.start)
    total = sum(map(sum, times.values()))
    ranked = sorted(times.items(), key=lambda entry: -sum(entry[1]))
    found["kernels"] = [
        {
            "name": name[:_NAME_LENGTH],
            "calls_per_step": len(spent) / steps,
            "milliseconds_per_step": sum(spent) / steps / 1e3,
            "share": sum(spent) / total,
        }
        for name, spent in ranked[: 3 * _LARGEST]
    ]
    return found


def _cover(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _find_gaps(spans: list[tuple[float, float]]) -> list[float]:
    """The longest times in which no interval of those, sorted by their start, runs."""
    gaps, reached = [], spans[0][1]
    for start, end in spans[1:]:
        gaps.append(max(0.0, start - reached))
        reached = max(reached, end)
    return sorted(gaps, reverse=True)[:_LARGEST]


def _list_operators(profiler: Any, steps: int, on_device: bool) -> list[dict[str, Any]]:
    def spent(row: Any) -> float:
        return float(row.self_device_time_total if on_device else row.self_cpu_time_total)

    rows = sorted(profiler.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, rows)) or 1.0
    return [
        {
            "name": row.key[:_NAME_LENGTH],
            "calls_per_step": row.count / steps,
            "milliseconds_per_step": spent(row) / steps / 1e3,
            "share": spent(row) / total,
        }
        for row in rows[:_LARGEST]
    ]
