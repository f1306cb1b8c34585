"""Checkpoints: how long training stands still, and the rates of writing, checking and loading."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from megatron_mdm.checkpoint.discovery import choose_checkpoint
from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest
from megatron_mdm.checkpoint.restoring import load_optimizer
from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config import CheckpointConfig, Config, check_layout
from megatron_mdm.core.errors import CheckpointError, ConfigError
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.model.accounting import count_parameters
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.benchmarks.devices import choose_device, choose_dtype, now
from megatron_mdm.studies.benchmarks.harness import bare_config, find_sizes, summarize
from megatron_mdm.studies.benchmarks.settings import CheckpointSettings
from megatron_mdm.training.engine import Engine

# Layers and hidden size.
MODELS = {"8M": (4, 256), "36M": (8, 512), "104M": (10, 832)}
WORLD_SIZES = (1, 2)
# A checkpoint holds float32 weights and two moments. While one is written the last one stays.
_BYTES_PER_PARAMETER, _MOST_CHECKPOINTS = 12, 2


def measure_checkpoints(
    folder: Path, settings: CheckpointSettings, models: dict[str, tuple[int, int]] = MODELS
) -> dict[str, Any]:
    """Measures saving, checking and loading with the real engine.

    On CPUs in one and in two gloo ranks, replicas under ZeRO-1, so that each writes its part of the
    parameters; with a preset or on a GPU in one rank. The files that are checked and loaded were
    just written: the page cache holds them.

    Args:
        folder: An empty folder on the disk to measure.
        settings: How often, where, and of which model.
        models: Layers and hidden size of each model, by name, where `settings` names none.

    Returns:
        For each model and number of ranks the checkpoint's size, the seconds that training stands
        still in the foreground and in the background, and the rates in millions of bytes per
        second.

    Raises:
        ConfigError: An argument is out of range, or the device or the room for it is missing.
        CheckpointError: A rank failed.
    """
    if settings.preset is None:
        sizes = {name: _make_sizes(*shape) for name, shape in models.items()}
    else:
        sizes = {settings.preset: find_sizes(settings.preset)}
    is_default = settings.preset is None and choose_device(settings.device).type == "cpu"
    configs = {name: _make_config(model, settings.device) for name, model in sizes.items()}
    _check_room(folder, configs)
    results: dict[str, Any] = {}
    for name, config in configs.items():
        for world_size in WORLD_SIZES if is_default else (1,):
            place = folder / f"{name}-{world_size}"
            place.mkdir()
            runs = _run_ranks(config, world_size, place, settings.repeats)
            shutil.rmtree(place)
            results[f"{name}, {world_size} ranks"] = _summarize(runs)
    return results


def _make_sizes(num_layers: int, hidden_size: int) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "ffn_hidden_size": 3 * hidden_size,
        "vocab_size": 8192,
    }


def _make_config(model: dict[str, Any], device: str) -> Config:
    batch = {"micro_batch_size": 1, "global_batch_size": 2}
    return bare_config(model, seq_length=64, batch=batch, run={"device": device})


def _check_room(folder: Path, configs: dict[str, Config]) -> None:
    most = max(count_parameters(config.model).padded_total for config in configs.values())
    needed, free = _MOST_CHECKPOINTS * _BYTES_PER_PARAMETER * most, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"The checkpoints need {needed:,} bytes in {folder.parent}, which has {free:,}: choose "
            "a smaller --preset, or another disk with TMPDIR."
        )


def _run_ranks(
    config: Config, world_size: int, folder: Path, repeats: int
) -> list[dict[str, float]]:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    given = (world_size, config, folder, repeats, results)
    try:
        spawn(_measure_rank, given, world_size)  # type: ignore[no-untyped-call]
    except ProcessException as error:
        raise CheckpointError(
            f"A rank of the benchmark in {folder} ended with an error: {error}"
        ) from None
    runs: list[dict[str, float]] = results.get()
    return runs


def _measure_rank(
    rank: int, world_size: int, config: Config, folder: Path, repeats: int, results: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    device = choose_device(config.run.device)
    dtype = choose_dtype(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
    )
    with open_mesh(config.parallel, device) as mesh:
        model = build_model(config, mesh, dtype)
        engine = Engine(config, check_layout(config, world_size), mesh, model, dtype)
        runs = [_measure_once(engine, config, folder / str(index)) for index in range(repeats)]
    if rank == 0:
        results.put(runs)
    dist.barrier()
    dist.destroy_process_group()


def _measure_once(engine: Engine, config: Config, folder: Path) -> dict[str, float]:
    measured: dict[str, float] = {}
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=1,
        consumed_samples=2,
        config=config.model_dump(mode="json"),
        versions={},
        data_fingerprint="",
    )
    for name in ("foreground", "background"):
        settings = CheckpointConfig(background=name == "background", keep_last=1)
        with CheckpointWriter(folder / name, settings, engine.mesh) as writer:
            # The first save of a run gets its memory, the next ones have it.
            for step in (1, 2):
                writer.save(
                    manifest.model_copy(update={"step": step}),
                    shards=engine.shards,
                    states=engine.states,
                )
                writer.wait()
            report = writer.take_reports()[-1]
        measured[f"{name}_stall_seconds"] = report.stall_seconds
        measured[f"{name}_write_seconds"] = report.write_seconds
        measured["num_bytes"] = report.num_bytes
        if name == "foreground":
            _delete(folder / name)
    place, device = folder / "background", engine.mesh.device

    def verify() -> None:
        choose_checkpoint(place, "refuse", engine.mesh)

    def load() -> None:
        reader = CheckpointReader(place / "step_00000002")
        load_optimizer(reader, engine.shards, engine.states)

    measured["verify_seconds"] = _seconds(verify, device)
    measured["load_seconds"] = _seconds(load, device)
    _delete(place)
    return measured


def _delete(folder: Path) -> None:
    # All ranks have closed its files; there is room for the checkpoints of one folder.
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    started = now(device)
    call()
    dist.barrier()
    return now(device) - started


def _summarize(runs: list[dict[str, float]]) -> dict[str, Any]:
    rates = {
        "foreground_save": "foreground_write_seconds",
        "background_save": "background_write_seconds",
        "verify": "verify_seconds",
        "load": "load_seconds",
    }
    return {
        "num_bytes": runs[0]["num_bytes"],
        "stall_seconds": {
            name: summarize([run[f"{name}_stall_seconds"] for run in runs])
            for name in ("foreground", "background")
        },
        "megabytes_per_second": {
            name: summarize([run["num_bytes"] / 1e6 / run[seconds] for run in runs])
            for name, seconds in rates.items()
        },
    }
