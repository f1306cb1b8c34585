"""What the last digits of a run's numbers depend on, and what of it changed since a checkpoint."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_mdm.checkpoint.manifest import CheckpointManifest, SavedEnvironment
from megatron_mdm.checkpoint.storage import name_checkpoint
from megatron_mdm.config import Config, parse_config
from megatron_mdm.distributed.gathering import gather
from megatron_mdm.distributed.mesh import Mesh

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
_CPUINFO = Path("/proc/cpuinfo")
# How Linux names a kind of CPU: the first three on x86, the others on ARM.
_CPU_FIELDS = {
    "vendor_id": "",
    "cpu family": "family ",
    "model": "model ",
    "CPU implementer": "implementer ",
    "CPU part": "part ",
}
# Fields that do not change which rank computes what, and so no dropout mask.
_SAME_MASKS = {"parallel.zero_stage", "parallel.overlap_gradient_reduction", "parallel.recompute"}


def count_threads() -> int:
    """Counts the threads of this process if `run.num_threads` is not set. Every rank calls it.

    Returns:
        The cores that it may use, shared among the ranks of its machine that may use them too:
        torchrun's default of one thread each wastes them, and srun and mpirun may have bound each
        rank to cores of its own.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    mine = {*affinity(0)} if affinity is not None else {*range(os.cpu_count() or 1)}
    host = socket.gethostname()
    everyone = gather((host, mine))
    sharers = sum(name == host and not mine.isdisjoint(cores) for name, cores in everyone)
    return max(1, len(mine) // sharers)


def list_versions() -> dict[str, str]:
    """Versions of what a result depends on.

    Returns:
        Python's, this package's and those of the libraries that compute, by name.
    """
    from megatron_mdm import __version__

    own = {"python": platform.python_version(), "megatron_mdm": __version__}
    return own | {name: version(name) for name in _PACKAGES}


def describe_processor(device: torch.device) -> str:
    """Names the kind of processor that computes.

    Returns:
        The GPU's name; of a CPU also family and model, as a cloud's names are coarse, and the
        instructions that PyTorch chooses its kernels by.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fields = {}
    if _CPUINFO.exists():
        first = _CPUINFO.read_text("utf-8", errors="replace").partition("\n\n")[0]
        for line in first.splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    details = [f"{word}{fields[key]}" for key, word in _CPU_FIELDS.items() if key in fields]
    shown = f"{name} ({', '.join(details)})" if details else name
    return f"{shown}, {torch.backends.cpu.get_cpu_capability()}"


def gather_environment(mesh: Mesh) -> SavedEnvironment:
    """What the ranks compute with. Every rank calls it.

    Returns:
        The same on every rank.
    """
    mine = (torch.get_num_threads(), describe_processor(mesh.device))
    threads, processors = zip(*gather(mine), strict=True)
    return SavedEnvironment(threads=sorted({*threads}), processors=sorted({*processors}))


def tell_other_conditions(plan: RunPlan) -> str:
    """Tells in one line what keeps a resumed run from equalling the uninterrupted one bit for bit.

    Args:
        plan: A run whose ranks have met, with a checkpoint to resume from.

    Returns:
        What differs, with both values; empty where nothing that the checkpoint records does.
    """
    if plan.saved is None or plan.environment is None:
        return ""
    manifest = plan.saved
    layout = _list_changes(*_collect(manifest, plan))
    others = _list_changes(*_list_environments(manifest.environment, plan))
    others |= _list_changes(manifest.versions, list_versions())
    told = ", ".join(f"{name} {change}" for name, change in (layout | others).items())
    if not told:
        return ""
    model = plan.config.model
    has_dropout = model.hidden_dropout > 0 or model.attention_dropout > 0
    outcome = "equal to an uninterrupted one to rounding, but not bit for bit"
    if has_dropout and layout.keys() - _SAME_MASKS:
        outcome = "but not as an uninterrupted one: dropout draws other masks under another layout"
    saved_by = name_checkpoint(manifest.step)
    return f"other conditions than those of {saved_by}: {told}; the run goes on, {outcome}"


def _collect(manifest: CheckpointManifest, plan: RunPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that divide sums, when the checkpoint was saved and now."""

    def list_fields(config: Config, num_ranks: int) -> dict[str, Any]:
        parallel = config.parallel.model_dump()
        return {
            "ranks": num_ranks,
            **{f"parallel.{name}": value for name, value in parallel.items()},
            "batch.micro_batch_size": config.batch.micro_batch_size,
        }

    saved = list_fields(parse_config(manifest.config), manifest.layout.world_size)
    return saved, list_fields(plan.config, plan.layout.world_size)


def _list_environments(
    saved: SavedEnvironment | None, plan: RunPlan
) -> tuple[dict[str, str], dict[str, str]]:
    if saved is None or plan.environment is None:
        return {}, {}

    def show(environment: SavedEnvironment) -> dict[str, str]:
        processor = {"processor": " and ".join(environment.processors)}
        if plan.device.type != "cpu":
            # A GPU's sums are not divided between threads of the CPU.
            return processor
        return {"threads": " and ".join(map(str, environment.threads))} | processor

    return show(saved), show(plan.environment)


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Lists both values of what differs; fields that one side does not record are ignored."""
    return {
        name: f"{_format_value(before[name])} -> {_format_value(now[name])}"
        for name in before
        if name in now and before[name] != now[name]
    }


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
