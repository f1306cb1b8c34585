"""Whole tensors put together from what the ranks of a layout hold of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mdm.model.shards import NamedShard


class Piece(NamedTuple):
    """A part of a whole tensor.

    Attributes:
        name: Global name.
        shape: Shape of the whole.
        slices: Parts of the whole that `values` holds one after the other.
        is_copy: A second copy of tied weights.
        values: The local tensor.
    """

    name: str
    shape: tuple[int, ...]
    slices: list[tuple[slice, ...]]
    is_copy: bool
    values: NDArray[np.float32]


def piece_of(shard: NamedShard, values: torch.Tensor) -> Piece:
    """Describes a local tensor.

    Args:
        shard: Its name and place.
        values: The tensor.

    Returns:
        The piece, as numpy.
    """
    array = values.detach().float().numpy().copy()
    return Piece(shard.name, shard.shape, shard.list_slices(), shard.is_copy, array)


def assemble(pieces: list[Piece]) -> dict[str, NDArray[np.float32]]:
    """Puts whole tensors together; copies must agree where they meet.

    Args:
        pieces: Of all ranks.

    Returns:
        Whole tensors by name.
    """
    wholes: dict[str, NDArray[np.float32]] = {}
    for piece in pieces:
        whole = wholes.setdefault(piece.name, np.full(piece.shape, np.nan, np.float32))
        assert whole.shape == piece.shape
        start = 0
        for part in piece.slices:
            target = whole[part]
            values = piece.values[start : start + target.shape[0]]
            known = ~np.isnan(target)
            np.testing.assert_array_equal(values[known], target[known], err_msg=piece.name)
            whole[part] = values
            start += target.shape[0]
        assert start == piece.values.shape[0]
    for name, whole in wholes.items():
        assert not np.isnan(whole).any(), f"{name} has parts that no rank holds"
    return wholes
