"""The weights of a run under way, whole on every rank, without a file between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.manifest import WEIGHT
from megatron_mdm.config import ModelConfig
from megatron_mdm.distributed.gathering import gather
from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names
from megatron_mdm.model.sharding import find_local_shape, list_shard_slices

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.distributed.mesh import Mesh
    from megatron_mdm.model.shards import NamedShard


def gather_weights(
    model: ModelConfig, shards: Sequence[NamedShard], states: OptimizerStates, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Gathers the float32 weights that a checkpoint would hold. All ranks have to exhaust it.

    Memory holds one parameter at a time.

    Args:
        model: The model's sizes.
        shards: This rank's parameters.
        states: Their float32 weights.
        mesh: This rank's place.

    Yields:
        Global name and whole tensor, float32 on this rank's device, in the order of a forward pass.
    """
    group = mesh.get_group("tp+pp")
    # The second copy of tied weights counts for nothing.
    mine = {shard.name: shard for shard in shards if not shard.is_copy}
    ranks_in_layer = {name: shard.tensor_rank for name, shard in mine.items() if shard.is_own}
    owners = gather(ranks_in_layer, group)
    for name in list_parameter_names(model):
        shape = find_parameter_shape(name, model)
        local_shape = find_local_shape(name, shape, mesh.tp.size)
        # Replicas hold the same parameters and come here in the same order: ZeRO gathers.
        value = states.get(mine[name].parameter, WEIGHT) if name in mine else None
        whole = torch.empty(shape, dtype=torch.float32, device=mesh.device)
        for place, owned in enumerate(owners):
            if name not in owned:
                continue
            part = torch.empty(local_shape, dtype=torch.float32, device=mesh.device)
            if value is not None and mine[name].is_own and dist.get_rank(group) == place:
                part.copy_(value.detach().reshape(local_shape))
            if len(owners) > 1:
                dist.broadcast(part, dist.get_global_rank(group, place), group)
            slices = list_shard_slices(name, shape, owned[name], mesh.tp.size)
            start = 0
            for cut in slices:
                target = whole[cut]
                target.copy_(part[start : start + len(target)])
                start += len(target)
        yield name, whole
