"""Saving and loading from within a run: all ranks write, one rename makes it visible."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
from megatron_mdm.checkpoint.storage import (
    LATEST,
    MANIFEST,
    MOMENTS,
    WEIGHT,
    CheckpointManifest,
    CheckpointReader,
    checkpoint_name,
)
from megatron_mdm.errors import CheckpointError
from megatron_mdm.files import write_text_whole
from megatron_mdm.model.parameters import NamedShard
from megatron_mdm.parallel.topology import Topology


def save_checkpoint(
    folder: Path,
    manifest: CheckpointManifest,
    *,
    shards: Sequence[NamedShard],
    states: OptimizerStates,
    topology: Topology,
) -> Path:
    """Writes a checkpoint. Every rank calls it.

    Args:
        folder: The run's `checkpoints` folder.
        manifest: What the checkpoint holds; its `files` are filled in here.
        shards: This rank's parameters.
        states: Their optimizer state.
        topology: This rank's place.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: A rank could not write; older checkpoints are untouched.
    """
    final = folder / checkpoint_name(manifest.step)
    aside = folder / f".{final.name}.tmp"
    problem, files = "", {}
    if topology.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            problem = str(error.strerror)
    dist.barrier()
    tensors = _collect(shards, states, topology)
    try:
        files = _write_tensors(aside, tensors, topology)
    # safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        problem = problem or str(error)
    files = _agree(aside, problem, files, topology)
    problem = ""
    if topology.rank == 0:
        try:
            _publish(aside, final, manifest.model_copy(update={"files": files}))
        except OSError as error:
            problem = str(error.strerror)
    _agree(aside, problem, {}, topology)
    return final


def load_weights(reader: CheckpointReader, shards: Sequence[NamedShard]) -> None:
    """Fills a stage's parameters, before the engine takes them over.

    Args:
        reader: An open checkpoint, written under any layout.
        shards: This rank's parameters.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    with torch.no_grad():
        for shard in shards:
            value = reader.load_shard(shard.name, shard.slices())
            _check_shape(reader, shard, value)
            shard.parameter.copy_(value)


def load_optimizer(
    reader: CheckpointReader, shards: Sequence[NamedShard], states: OptimizerStates
) -> None:
    """Restores float32 weights and moments.

    Args:
        reader: An open checkpoint, written under any layout.
        shards: This rank's parameters.
        states: Their optimizer state.
    """
    states.set_step(reader.manifest.step)
    for shard in shards:
        for kind in (WEIGHT, *MOMENTS):
            states.set(shard.parameter, kind, reader.load_shard(shard.name, shard.slices(), kind))


def _collect(
    shards: Sequence[NamedShard], states: OptimizerStates, topology: Topology
) -> dict[str, dict[str, Tensor]]:
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for index, shard in enumerate(shards):
        # Replicas share the writing: each takes every R-th parameter.
        mine = index % topology.data_size == topology.data_rank
        mine &= not shard.is_copy and (shard.is_split or topology.tensor_rank == 0)
        for kind in (WEIGHT, *MOMENTS):
            value = states.get(shard.parameter, kind)  # all replicas: ZeRO gathers
            if mine:
                target = weights if kind == WEIGHT else moments
                target[f"{kind}/{shard.name}"] = value.contiguous()
    return {"weights": weights, "optimizer": moments}


def _publish(aside: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_text_whole(aside / MANIFEST, manifest.model_dump_json(indent=2))
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    write_text_whole(final.parent / LATEST, final.name + "\n")


def _agree(aside: Path, problem: str, files: dict[str, int], topology: Topology) -> dict[str, int]:
    # All ranks learn of a problem on one, so that none goes on or waits for it.
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, (problem, files))
    for rank, (found, _) in enumerate(everyone):
        if found:
            if topology.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"{aside} cannot be written by rank {rank} ({found}): free some space; older "
                "checkpoints are whole."
            )
    return {name: size for _, theirs in everyone for name, size in theirs.items()}


def _write_tensors(
    folder: Path, tensors: dict[str, dict[str, Tensor]], topology: Topology
) -> dict[str, int]:
    place = f"tp{topology.tensor_rank}-pp{topology.pipeline_rank}-dp{topology.data_rank}"
    metadata = {"format": "pt", "tensor_rank": str(topology.tensor_rank)}
    sizes = {}
    for kind, values in tensors.items():
        if values:
            path = folder / f"{kind}-{place}.safetensors"
            save_file(values, path, metadata)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
    return sizes


def _check_shape(reader: CheckpointReader, shard: NamedShard, value: Tensor) -> None:
    if tuple(value.shape) != shard.local_shape:
        raise CheckpointError(
            f"{reader.path} holds {shard.name} in another shape than this model's {shard.shape}: "
            "resume with the config that wrote it."
        )
