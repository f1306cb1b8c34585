"""How whole parameters are divided over tensor-parallel ranks. Plain data: it needs no engine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mdm.model.parameters import find_parameter

Slices = tuple[slice, ...]


def find_local_shape(name: str, shape: Sequence[int], tensor_size: int) -> tuple[int, ...]:
    """Shape of the part of a parameter that each tensor-parallel rank holds.

    Args:
        name: Global name.
        shape: Global shape.
        tensor_size: Ranks that share a layer.

    Returns:
        The shape, the same on all of them.
    """
    sizes, dim = list(shape), find_parameter(name).split_dim
    if dim is not None:
        sizes[dim] //= tensor_size
    return tuple(sizes)


def list_shard_slices(
    name: str, shape: Sequence[int], tensor_rank: int, tensor_size: int
) -> list[Slices]:
    """The slices of a whole parameter that a tensor-parallel rank holds, in its local order.

    Args:
        name: Global name.
        shape: Global shape.
        tensor_rank: Place in the tensor-parallel group.
        tensor_size: Size of the group.

    Returns:
        Slices whose contents, concatenated along the first dimension, are the local tensor.
    """
    parameter = find_parameter(name)
    whole = tuple(slice(0, size) for size in shape)
    dim = parameter.split_dim
    if dim is None:
        return [whole]
    block = shape[dim] // parameter.blocks
    part = block // tensor_size
    result = []
    for index in range(parameter.blocks):
        start = index * block + tensor_rank * part
        result.append((*whole[:dim], slice(start, start + part), *whole[dim + 1 :]))
    return result
