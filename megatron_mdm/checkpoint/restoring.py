"""Restores a run's parameters and optimizer state from a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.core.errors import CheckpointError

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.model.shards import NamedShard


def load_weights(reader: CheckpointReader, shards: Sequence[NamedShard]) -> None:
    """Fills a stage's parameters, before the engine takes them over.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    with torch.no_grad():
        for shard in shards:
            if (found := reader.find_shape(shard.name)) != shard.shape:
                raise CheckpointError(
                    f"{reader.path} holds {shard.name} in another shape, {list(found)}, than this "
                    f"model's {list(shard.shape)}: use the config that wrote it."
                )
            shard.parameter.copy_(reader.load_shard(shard.name, shard.list_slices()))


def load_optimizer(
    reader: CheckpointReader, shards: Sequence[NamedShard], states: OptimizerStates
) -> None:
    """Restores float32 weights and the optimizer's states.

    Raises:
        CheckpointError: The checkpoint is of another optimizer.
    """
    saved = reader.manifest.optimizer
    if set(saved.states) != set(states.names) or saved.by_role != states.by_role:
        raise CheckpointError(
            f"{reader.path} holds the optimizer states {', '.join(saved.states)}, and this "
            f"optimizer keeps {', '.join(states.names)}: use the optimizer that wrote it."
        )
    states.set_numbers(saved.numbers)
    for shard in shards:
        slices = shard.list_slices()
        for kind in states.list_kinds(shard):
            states.set(shard.parameter, kind, reader.load_shard(shard.name, slices, kind))
