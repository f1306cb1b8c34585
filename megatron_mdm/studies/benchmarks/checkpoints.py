"""Checkpoints: how long training stands still, and the rates of writing, checking and loading."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
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
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.benchmarks.harness import bare_config, summarize
from megatron_mdm.studies.benchmarks.settings import CheckpointSettings
from megatron_mdm.training.engine import Engine

# Layers and hidden size; a checkpoint takes 12 bytes per parameter.
MODELS = {"8M": (4, 256), "36M": (8, 512), "104M": (10, 832)}
WORLD_SIZES = (1, 2)


def measure_checkpoints(
    folder: Path, settings: CheckpointSettings, models: dict[str, tuple[int, int]] = MODELS
) -> dict[str, Any]:
    """Measures saving, checking and loading with the real engine in gloo ranks on CPUs.

    Ranks are replicas under ZeRO-1, so each writes its part of the parameters. The files that are
    checked and loaded were just written: the page cache holds them.

    Args:
        folder: An empty folder on the disk to measure.
        settings: How often.
        models: Layers and hidden size of each model, by name.

    Returns:
        For each model and number of ranks the checkpoint's size, the seconds that training stands
        still in the foreground and in the background, and the rates in millions of bytes per
        second.

    Raises:
        ConfigError: An argument is out of range.
        CheckpointError: A rank failed.
    """
    results: dict[str, Any] = {}
    for name, (num_layers, hidden_size) in models.items():
        config = _config(num_layers, hidden_size)
        for world_size in WORLD_SIZES:
            place = folder / f"{name}-{world_size}"
            place.mkdir()
            runs = _run_ranks(config, world_size, place, settings.repeats)
            shutil.rmtree(place)
            results[f"{name}, {world_size} ranks"] = _summarize(runs)
    return results


def _config(num_layers: int, hidden_size: int) -> Config:
    model = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "ffn_hidden_size": 3 * hidden_size,
        "vocab_size": 8192,
    }
    batch = {"micro_batch_size": 1, "global_batch_size": 2}
    return bare_config(model, seq_length=64, batch=batch, run={"device": "cpu"})


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
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
    )
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        model = build_model(config, mesh, torch.float32)
        engine = Engine(config, check_layout(config, world_size), mesh, model, torch.float32)
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
    place = folder / "background"
    measured["verify_seconds"] = _seconds(lambda: choose_checkpoint(place, "refuse", engine.mesh))

    def load() -> None:
        reader = CheckpointReader(place / "step_00000002")
        load_optimizer(reader, engine.shards, engine.states)

    measured["load_seconds"] = _seconds(load)
    return measured


def _seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - started


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
