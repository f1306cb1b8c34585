"""Plain values of all ranks, brought together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def gather(mine: _Value, group: Any = None) -> list[_Value]:
    """Gathers a value of every rank; each rank calls it.

    Args:
        mine: What this rank gives; anything that can be pickled.
        group: The ranks; None: all of the run, which may be one process without any group.

    Returns:
        What each rank gave, by rank.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
