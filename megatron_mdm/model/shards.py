"""Parameters of a stage under their global names: which part of which whole a rank holds.

Names and shapes do not depend on the layout: layers are numbered over all stages, and a shard is
described by slices of the whole tensor. Initial weights and checkpoints both speak this language.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mdm.config import ModelConfig
from megatron_mdm.config.parameter_groups import OptimizedParameter, ParameterRole
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.interleaving import list_chunks
from megatron_mdm.model.parameters import (
    EMBEDDING,
    OUTPUT_LAYER,
    find_layer,
    find_parameter,
    find_parameter_shape,
)
from megatron_mdm.model.sharding import Slices, find_local_shape, list_shard_slices


@dataclass(frozen=True)
class NamedShard:
    """A local parameter and what it is a part of.

    Attributes:
        name: Global name.
        shape: Global shape.
        parameter: The local tensor. Under ZeRO-3 it may be empty between uses.
        tensor_rank: Place in the tensor-parallel group.
        tensor_size: Size of the group.
        is_copy: Is it the second copy of tied weights, on the last pipeline stage?
    """

    name: str
    shape: tuple[int, ...]
    parameter: torch.nn.Parameter
    tensor_rank: int
    tensor_size: int
    is_copy: bool

    @property
    def role(self) -> ParameterRole:
        """What the parameter is in the network."""
        return find_parameter(self.name).role

    @property
    def is_split(self) -> bool:
        """Is the parameter divided over tensor-parallel ranks, even if there is only one?"""
        return find_parameter(self.name).split_dim is not None

    @property
    def is_own(self) -> bool:
        """Is this the rank of its replica that writes and counts these values?"""
        return not self.is_copy and (self.is_split or self.tensor_rank == 0)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        return find_local_shape(self.name, self.shape, self.tensor_size)

    def list_slices(self) -> list[Slices]:
        """Slices of the whole parameter that the local tensor holds, in order."""
        return list_shard_slices(self.name, self.shape, self.tensor_rank, self.tensor_size)


def describe_parameters(
    shards: Iterable[NamedShard], model: ModelConfig
) -> list[OptimizedParameter]:
    """Describes the parameters of a stage to an optimizer.

    Args:
        shards: Of the stage.
        model: Sizes.

    Returns:
        What the table of parameters says of each, in the shards' order.
    """
    described = []
    for shard in shards:
        row = find_parameter(shard.name)
        described.append(
            OptimizedParameter(
                name=shard.name,
                role=row.role,
                decays=row.decays,
                shape=shard.shape,
                tensor=shard.parameter,
                rows=() if row.runs is None else tuple(row.runs(model)),
                matrices=row.matrices,
            )
        )
    return described


def name_shards(module: torch.nn.Module, mesh: Mesh) -> Iterator[NamedShard]:
    """Names the parameters of a stage by their global names.

    Args:
        module: A `DiffusionTransformer` or `InterleavedStage`, not yet partitioned by ZeRO-3 or
            already so.
        mesh: This rank's place.

    Yields:
        One shard per parameter, in the module's order.
    """
    for chunk in list_chunks(module):
        yield from _name_chunk_shards(chunk, mesh)


def _name_chunk_shards(module: Any, mesh: Mesh) -> Iterator[NamedShard]:
    first_layer = _find_first_layer(module)
    tied = bool(getattr(module, "share_embeddings_and_output_weights", False))
    for local_name, parameter in module.named_parameters():
        name, layer = local_name, find_layer(local_name)
        if layer is not None:
            name = name.replace(f".{layer}.", f".{layer + first_layer}.", 1)
        is_copy = tied and name == OUTPUT_LAYER
        if is_copy:
            name = EMBEDDING
        shape = find_parameter_shape(name, module.sizes)
        yield NamedShard(name, shape, parameter, mesh.tp.rank, mesh.tp.size, is_copy)


def _find_first_layer(module: torch.nn.Module) -> int:
    layers = module.get_submodule("decoder.layers")
    first = next(iter(layers.children()), None)
    return 0 if first is None else int(getattr(first, "layer_number", 1)) - 1
