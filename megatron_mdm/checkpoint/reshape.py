"""Resharding: the same checkpoint for another division of ranks, without starting any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    SavedLayout,
    read_saved_model,
)
from megatron_mdm.checkpoint.publishing import publish_checkpoint, write_aside
from megatron_mdm.checkpoint.rank_files import MAX_FILE_BYTES
from megatron_mdm.checkpoint.resharding import write_divided
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.checkpoint.weights import plan_weights_layout
from megatron_mdm.config import Config, ParallelConfig, check_layout, parse_config
from megatron_mdm.core.errors import CheckpointError


def reshard_checkpoint(
    path: Path,
    output: Path,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes a checkpoint as another division of ranks would have.

    Memory holds the tensor that is being divided and a rank's part of it.

    Args:
        path: A checkpoint's folder.
        output: A `checkpoints` folder; the result gets the same name in it.
        tensor_parallel_size: Ranks per layer.
        pipeline_parallel_size: Pipeline stages.
        max_file_bytes: A tensor file holds at most so many bytes, or one larger tensor.

    Raises:
        CheckpointError: The checkpoint is damaged, or the output exists or cannot be written.
        ConfigError: The model cannot be divided so.
    """
    manifest = verify_checkpoint(path)
    final = output / path.name
    if final.exists():
        raise CheckpointError(f"{final} exists: choose another output folder, or remove it.")
    changes = _divide_manifest(manifest, tensor_parallel_size, pipeline_parallel_size)
    with write_aside(final) as aside:
        reader = CheckpointReader(path)
        changes["files"] = write_divided(
            reader.load,
            manifest.parameters,
            manifest.list_kinds,
            changes["layout"],
            aside,
            num_layers=read_saved_model(manifest).model.num_layers,
            max_file_bytes=max_file_bytes,
        )
        publish_checkpoint(aside, final, manifest.model_copy(update=changes))
    return final


def _divide_manifest(
    manifest: CheckpointManifest, tensor_parallel_size: int, pipeline_parallel_size: int
) -> dict[str, Any]:
    """What changes in the manifest besides the files."""
    changes: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if manifest.kind == "weights":
        model = read_saved_model(manifest)
        layout = plan_weights_layout(model, tensor_parallel_size, pipeline_parallel_size)
        return changes | {"layout": layout}
    config = _divide_run(manifest.config, tensor_parallel_size, pipeline_parallel_size)
    layout = SavedLayout(
        world_size=tensor_parallel_size * pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=1,
        zero_stage=config.parallel.zero_stage,
    )
    return changes | {"layout": layout, "config": config.model_dump(mode="json")}


def _divide_run(
    tree: dict[str, Any], tensor_parallel_size: int, pipeline_parallel_size: int
) -> Config:
    before = ParallelConfig.model_validate(tree["parallel"])
    parallel = {
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": pipeline_parallel_size,
        "sequence_parallel": before.sequence_parallel and tensor_parallel_size > 1,
        "virtual_pipeline_model_parallel_size": 1,
        # ZeRO-3 does not work with stages.
        "zero_stage": min(before.zero_stage, 2 if pipeline_parallel_size > 1 else 3),
    }
    config = parse_config(tree | {"parallel": parallel})
    check_layout(config, tensor_parallel_size * pipeline_parallel_size)
    return config
