"""The same checkpoint for another division of ranks, without starting any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megatron_mdm.checkpoint.choosing import verify_checkpoint
from megatron_mdm.checkpoint.rank_files import MAX_FILE_BYTES, RankFiles, SavedTensor
from megatron_mdm.checkpoint.saving import prepare_folder, publish_checkpoint
from megatron_mdm.checkpoint.storage import (
    MOMENTS,
    WEIGHT,
    CheckpointReader,
    FileRecord,
    SavedLayout,
)
from megatron_mdm.config import Config, ParallelConfig, check_layout, config_from_dict
from megatron_mdm.errors import CheckpointError
from megatron_mdm.model.sharding import shard_rule, shard_slices


def reshape_checkpoint(
    path: Path,
    output: Path,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes a checkpoint as another division of ranks would have.

    Memory holds one output file of weights, one of moments, and the tensor that is being divided.

    Args:
        path: A checkpoint's folder.
        output: A `checkpoints` folder; the result gets the same name in it.
        tensor_parallel_size: Ranks a layer.
        pipeline_parallel_size: Pipeline stages.
        max_file_bytes: A tensor file holds at most so many bytes, or one larger tensor.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: The checkpoint is damaged, or the output exists or cannot be written.
        ConfigError: The model cannot be divided so.
    """
    manifest = verify_checkpoint(path)
    final = output / path.name
    if final.exists():
        raise CheckpointError(f"{final} exists: choose another output folder, or remove it.")
    config = _divided(manifest.config, tensor_parallel_size, pipeline_parallel_size)
    layout = SavedLayout(
        world_size=tensor_parallel_size * pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=1,
        zero_stage=config.parallel.zero_stage,
    )
    aside = output / f".{final.name}.tmp"
    files: dict[str, FileRecord] = {}
    try:
        prepare_folder(aside)
        with CheckpointReader(path) as reader:
            for stage in range(pipeline_parallel_size):
                for rank in range(tensor_parallel_size):
                    writer = RankFiles(
                        aside,
                        tensor_rank=rank,
                        pipeline_rank=stage,
                        data_rank=0,
                        max_file_bytes=max_file_bytes,
                    )
                    files |= writer.write(_share(reader, config, layout, rank, stage))
        changes = {"config": config.model_dump(mode="json"), "layout": layout, "files": files}
        publish_checkpoint(aside, final, manifest.model_copy(update=changes))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{final} cannot be written ({reason}): free some space or choose another folder."
        ) from None
    return final


def _divided(tree: dict, tensor_parallel_size: int, pipeline_parallel_size: int) -> Config:
    before = ParallelConfig.model_validate(tree["parallel"])
    parallel = {
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": pipeline_parallel_size,
        "sequence_parallel": before.sequence_parallel and tensor_parallel_size > 1,
        "virtual_pipeline_stages": 1,
        # ZeRO-3 does not work with stages.
        "zero_stage": min(before.zero_stage, 2 if pipeline_parallel_size > 1 else 3),
    }
    config = config_from_dict(tree | {"parallel": parallel})
    check_layout(config, tensor_parallel_size * pipeline_parallel_size)
    return config


def _share(
    reader: CheckpointReader, config: Config, layout: SavedLayout, rank: int, stage: int
) -> Iterator[SavedTensor]:
    size = layout.tensor_parallel_size
    for name, shape in reader.manifest.parameters.items():
        is_split = shard_rule(name).dim is not None
        if _stage_of(name, config, layout) == stage and (is_split or rank == 0):
            slices = shard_slices(name, tuple(shape), rank, size)
            for kind in (WEIGHT, *MOMENTS):
                yield SavedTensor(kind, name, reader.load_shard(name, slices, kind))


def _stage_of(name: str, config: Config, layout: SavedLayout) -> int:
    stages = layout.pipeline_parallel_size
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        return int(match[1]) * stages // config.model.num_layers
    return 0 if name.startswith("embedding.") else stages - 1
