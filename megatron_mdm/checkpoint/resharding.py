"""Divides whole tensors into the files that the ranks of a layout would have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import FileRecord, SavedLayout
from megatron_mdm.checkpoint.rank_files import PlannedTensor, RankFiles, SavedTensor
from megatron_mdm.model.parameters import find_parameter, find_stage
from megatron_mdm.model.sharding import find_local_shape, list_shard_slices

Load = Callable[[str, str], Tensor]


class _Place(NamedTuple):
    """Who writes a part of a tensor."""

    stage: int
    tensor_rank: int


def write_divided(
    load: Load,
    parameters: Mapping[str, Sequence[int]],
    list_kinds: Callable[[str], Sequence[str]],
    layout: SavedLayout,
    folder: Path,
    *,
    num_layers: int,
    max_file_bytes: int,
) -> dict[str, FileRecord]:
    """Writes the tensor files of a checkpoint. Memory holds one whole tensor and a part of it.

    Args:
        load: Gives a whole tensor by name and kind.
        parameters: Global shape of each parameter.
        list_kinds: Says what to write of each: `weight`, and states of the optimizer.
        layout: The division of ranks, with one replica.
        folder: Where to write.
        num_layers: Layers of the model.
        max_file_bytes: A file holds at most so many bytes of tensors, or one larger tensor.

    Returns:
        The files, after reading them back.

    Raises:
        OSError: A file cannot be written, or reads back as something else.
    """
    tensor_size = layout.tensor_parallel_size
    places = {name: _list_places(name, layout, num_layers) for name in parameters}
    planned: dict[_Place, list[PlannedTensor]] = {}
    for name, shape in parameters.items():
        part_shape = find_local_shape(name, shape, tensor_size)
        for place in places[name]:
            wanted = [PlannedTensor(kind, name, part_shape) for kind in list_kinds(name)]
            planned.setdefault(place, []).extend(wanted)
    ranks = {
        place: RankFiles(
            folder,
            tensors,
            tensor_rank=place.tensor_rank,
            pipeline_rank=place.stage,
            data_rank=0,
            max_file_bytes=max_file_bytes,
        )
        for place, tensors in planned.items()
    }
    try:
        for name in parameters:
            owners = {place: ranks[place] for place in places[name]}
            for kind in list_kinds(name):
                # Not held in a variable, which would keep it while the next tensor is loaded.
                _put_parts(load(name, kind), name, kind, owners, tensor_size)
        return {file: record for rank in ranks.values() for file, record in rank.finish().items()}
    finally:
        for rank in ranks.values():
            rank.close()


def _put_parts(
    whole: Tensor, name: str, kind: str, owners: Mapping[_Place, RankFiles], tensor_size: int
) -> None:
    for place, files in owners.items():
        slices = list_shard_slices(name, tuple(whole.shape), place.tensor_rank, tensor_size)
        # The blocks of an undivided tensor stand in order: nothing to put together.
        parts = [whole] if tensor_size == 1 else [whole[part] for part in slices]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        files.put(SavedTensor(kind, name, value))


def _list_places(name: str, layout: SavedLayout, num_layers: int) -> list[_Place]:
    stage = find_stage(name, num_layers, layout.pipeline_parallel_size)
    is_split = find_parameter(name).split_dim is not None
    return [_Place(stage, rank) for rank in range(layout.tensor_parallel_size if is_split else 1)]
