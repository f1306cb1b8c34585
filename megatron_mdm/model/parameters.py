"""Global names and shards: which slice of which whole parameter a rank holds.

Names and shapes do not depend on the layout: layers are numbered over all stages, and a shard is
described by slices of the whole tensor. Initial weights and checkpoints both speak this language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_mdm.distributed.topology import Topology
from megatron_mdm.model.interleaving import chunks_of
from megatron_mdm.model.sharding import Slices, shard_rule, shard_slices


@dataclass(frozen=True)
class NamedShard:
    """A local parameter and what it is a part of.

    Attributes:
        name: Global name.
        shape: Global shape.
        parameter: The local tensor. Under ZeRO-3 it may be empty between uses.
        tensor_rank: Place in the tensor-parallel group.
        tensor_size: Size of the group.
        is_copy: A second copy of tied weights, on the last pipeline stage.
    """

    name: str
    shape: tuple[int, ...]
    parameter: torch.nn.Parameter
    tensor_rank: int
    tensor_size: int
    is_copy: bool

    @property
    def is_split(self) -> bool:
        """Is the parameter divided over tensor-parallel ranks, even if there is only one?"""
        return shard_rule(self.name).dim is not None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        rule = shard_rule(self.name)
        sizes = list(self.shape)
        if rule.dim is not None:
            sizes[rule.dim] //= self.tensor_size
        return tuple(sizes)

    def slices(self) -> list[Slices]:
        """Slices of the whole parameter that the local tensor holds, in order."""
        return shard_slices(self.name, self.shape, self.tensor_rank, self.tensor_size)


def named_shards(module: torch.nn.Module, topology: Topology) -> Iterator[NamedShard]:
    """The parameters of a stage under their global names.

    Args:
        module: A `DiffusionTransformer` or `InterleavedStage`, not yet partitioned by ZeRO-3 or
            already so.
        topology: This rank's place.

    Yields:
        One shard per parameter, in the module's order.
    """
    for chunk in chunks_of(module):
        yield from _chunk_shards(chunk, topology)


def _chunk_shards(module: torch.nn.Module, topology: Topology) -> Iterator[NamedShard]:
    offset = _first_layer(module)
    for local_name, parameter in module.named_parameters():
        name = re.sub(
            r"^decoder\.layers\.(\d+)\.",
            lambda match: f"decoder.layers.{int(match[1]) + offset}.",
            local_name,
        )
        tied = bool(getattr(module, "share_embeddings_and_output_weights", False))
        is_copy = tied and name == "output_layer.weight"
        if is_copy:
            name = "embedding.word_embeddings.weight"
        # DeepSpeed keeps the true shape here when ZeRO-3 has emptied the tensor.
        sizes = list(getattr(parameter, "ds_shape", parameter.shape))
        rule = shard_rule(name)
        if rule.dim is not None:
            sizes[rule.dim] *= topology.tensor_size
        yield NamedShard(
            name, tuple(sizes), parameter, topology.tensor_rank, topology.tensor_size, is_copy
        )


def _first_layer(module: torch.nn.Module) -> int:
    layers = module.get_submodule("decoder.layers")
    first = next(iter(layers.children()), None)
    return 0 if first is None else int(getattr(first, "layer_number", 1)) - 1
