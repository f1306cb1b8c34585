"""What an optimizer steps under each ZeRO stage: parameters, or flat pieces of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of DeepSpeed's optimizers for ZeRO 1 and 2, for ZeRO 1 in bf16, and for ZeRO 3: this rank's flat
# tensors, and the parameters whose pieces each of them holds.
_ATTRIBUTES = (
    ("single_partition_of_fp32_groups", "bit16_groups"),
    ("fp32_groups_flat_partition", "bf16_groups"),
    ("fp32_partitioned_groups_flat", "fp16_groups"),
)


class Extent(NamedTuple):
    """Elements of a parameter in a flat tensor.

    Attributes:
        place: Which of the flat tensor's parameters.
        start: The first of them in the parameter, flattened.
        numel: How many, at least 1.
        offset: Where they begin in the flat tensor.
    """

    place: int
    start: int
    numel: int
    offset: int


class FlatTensor(NamedTuple):
    """A tensor that the optimizer steps.

    Attributes:
        tensor: This rank's.
        parameters: Those that it and its peers' hold, in order.
        zero_stage: The run's ZeRO stage, 0 to 3.
    """

    tensor: Tensor
    parameters: Sequence[torch.nn.Parameter]
    zero_stage: int

    def list_extents(self, replica: int, num_replicas: int) -> list[Extent]:
        """Lists what a replica's tensor holds, in order.

        ZeRO 1 and 2 cut all parameters, one after another, in as many equal parts as there are
        replicas; ZeRO 3 cuts each parameter so; without ZeRO each replica holds all.
        """
        if self.zero_stage == 3:
            return self._list_even_extents(replica, num_replicas)
        size = self.tensor.numel()
        begin = replica * size if self.zero_stage else 0
        extents, position = [], 0
        for place, parameter in enumerate(self.parameters):
            first = max(position, begin)
            position += parameter.numel()
            last = min(position, begin + size)
            if first < last:
                start = first - (position - parameter.numel())
                extents.append(Extent(place, start, last - first, first - begin))
        return extents

    def _list_even_extents(self, replica: int, num_replicas: int) -> list[Extent]:
        extents, offset = [], 0
        for place, parameter in enumerate(self.parameters):
            # What DeepSpeed has emptied knows its size by this name.
            numel = parameter.ds_numel  # type: ignore[attr-defined]
            part = -(-numel // num_replicas)
            start = replica * part
            if start < numel:
                extents.append(Extent(place, start, min(part, numel - start), offset))
            offset += part
        return extents


def list_flat_tensors(optimizer: Any, zero_stage: int) -> list[FlatTensor]:
    """Lists what an optimizer steps.

    Args:
        optimizer: What `deepspeed.initialize` returned.
        zero_stage: The run's ZeRO stage, 0 to 3.
    """
    if not zero_stage:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        return [FlatTensor(one, [one], zero_stage) for one in parameters]
    flats, groups = next(
        (getattr(optimizer, flats), getattr(optimizer, groups))
        for flats, groups in _ATTRIBUTES
        if hasattr(optimizer, flats)
    )
    return [FlatTensor(*pair, zero_stage) for pair in zip(flats, groups, strict=True)]
