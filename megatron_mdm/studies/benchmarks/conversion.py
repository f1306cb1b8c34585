"""Conversion: how much memory it takes beside its largest tensor, and how fast, beside a copy."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.checkpoint.streaming import TensorFile, TensorInfo
from megatron_mdm.config import ModelConfig, list_presets
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.hf.conversion.importing import import_to_checkpoint
from megatron_mdm.hf.formats.foreign import open_foreign
from megatron_mdm.hf.formats.translation import list_external_shapes
from megatron_mdm.hf.from_run import export_run
from megatron_mdm.model.parameters import list_parameter_names, list_parameters
from megatron_mdm.studies.benchmarks.harness import (
    Measurement,
    run_isolated,
    summarize,
    summarize_times,
)
from megatron_mdm.studies.benchmarks.settings import ConversionSettings

_SEQ_LENGTH = 2048
_BYTES_PER_WEIGHT = 4
# Source, checkpoint and export, or source and copy; and what is little beside them.
_COPIES, _ROOM_BYTES = 3, 100_000_000
# Goal: so many times the largest tensor, and so many bytes.
_GOAL_TENSORS, _GOAL_BYTES = 2, 500_000_000


def measure_conversion(folder: Path, settings: ConversionSettings) -> dict[str, Any]:
    """Measures an import and an export of random float32 weights, each in a process of its own.

    Every case reads from the disk, what the page cache held is dropped, and ends with its output
    on the disk. Conversions also read back what they wrote.

    Args:
        folder: An empty folder on the disk to measure.
        settings: The model, and how often.

    Returns:
        Sizes in bytes; for each case the seconds, the rate of bytes read and written together, and
        the largest memory above that of a process that has only imported the same code.

    Raises:
        ConfigError: An argument is out of range, or the disk has too little room.
    """
    preset = settings.preset
    saved = _model_of(preset)
    num_bytes = _BYTES_PER_WEIGHT * sum(math.prod(info.shape) for info in _source_tensors(saved))
    largest = max(row.size(saved.model) for row in list_parameters(saved.model))
    largest_bytes = _BYTES_PER_WEIGHT * largest
    needed = _COPIES * num_bytes + _ROOM_BYTES
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(
            f"--preset={preset} needs {needed:,} bytes in {folder.parent}, which has {free:,}: "
            "choose a smaller one, or another disk with TMPDIR."
        )
    source = folder / "model.safetensors"
    _write_source(source, saved)
    baseline = run_isolated(_do_nothing).peak_bytes
    places = {name: folder / name for name in ("copy", "from-smdm", "to-hf")}
    # Of each the function and its arguments; the first of these is what it reads.
    cases: dict[str, tuple[Any, ...]] = {
        "copy": (_copy, source, places["copy"]),
        "from-smdm": (_import, source, preset, places["from-smdm"]),
        "to-hf": (_export, places["from-smdm"], places["to-hf"]),
    }
    found: dict[str, list[tuple[int, Measurement[None]]]] = {name: [] for name in cases}
    for _ in range(settings.repeats):
        for name, (_, origin, *_others) in cases.items():
            _drop_from_cache(origin)
            measurement = run_isolated(*cases[name])
            moved = _size(origin) + _size(places[name])
            found[name].append((moved, measurement))
            if name == "copy":
                places[name].unlink()
        for name in ("from-smdm", "to-hf"):
            shutil.rmtree(places[name])
    source.unlink()
    goal = _GOAL_TENSORS * largest_bytes + _GOAL_BYTES
    return {
        "source_bytes": num_bytes,
        "largest_tensor_bytes": largest_bytes,
        "disk_bytes": needed,
        "baseline_peak_bytes": baseline,
        "goal_peak_above_baseline_bytes": goal,
        "cases": {name: _summarize(runs, baseline, goal) for name, runs in found.items()},
    }


def _model_of(preset: str) -> SavedModel:
    names = [name for name in list_presets() if name.startswith("smdm-")]
    if preset not in names:
        raise ConfigError(
            f"--preset={preset} is not of the family smdm: use {names[0]} to {names[-1]}."
        )
    model = ModelConfig.model_validate({"preset": preset})
    return SavedModel(model, "mdm", _SEQ_LENGTH)


def _source_tensors(saved: SavedModel) -> Iterator[TensorInfo]:
    for name in list_parameter_names(saved.model):
        for external, shape in list_external_shapes("smdm", name, saved):
            yield TensorInfo(external, torch.float32, shape)


def _write_source(path: Path, saved: SavedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    infos = list(_source_tensors(saved))
    file = TensorFile(path, infos, {"format": "pt"}, has_digest=False)
    try:
        for info in infos:
            file.write(info.name, torch.randn(info.shape, generator=generator))
        file.finish()
    finally:
        file.close()


def _do_nothing() -> None:
    pass


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _import(source: Path, preset: str, target: Path) -> None:
    import_to_checkpoint(open_foreign("smdm", source, preset=preset), target)


def _export(source: Path, target: Path) -> None:
    export_run(source, target)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _drop_from_cache(path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(path):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _summarize(
    runs: list[tuple[int, Measurement[None]]], baseline: int, goal: int
) -> dict[str, Any]:
    above = [run.peak_bytes - baseline for _, run in runs]
    return {
        **summarize_times([run for _, run in runs]),
        "megabytes_per_second": summarize([moved / 1e6 / run.seconds for moved, run in runs]),
        "peak_above_baseline_bytes": summarize(above),
        "within_goal": max(above) <= goal,
    }
