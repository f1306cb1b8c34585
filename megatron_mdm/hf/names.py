"""Names and shapes of our own export, which `formats.py` knows as the format `hf`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_mdm.hf.architecture import Architecture
from megatron_mdm.hf.formats import (
    external_shapes,
    from_format,
    to_format,
    training_names,
    training_shape,
)

__all__ = ["Architecture", "from_hf", "hf_shapes", "to_hf", "training_names", "training_shape"]


def hf_shapes(name: str, arch: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """Gives the exported names and shapes of one training parameter; see `external_shapes`."""
    return external_shapes("hf", name, arch)


def to_hf(name: str, tensor: Tensor, arch: Architecture) -> list[tuple[str, Tensor]]:
    """Converts one training parameter to its exported tensors; see `to_format`."""
    return to_format("hf", name, tensor, arch)


def from_hf(name: str, load: Callable[[str], Tensor], arch: Architecture) -> Tensor:
    """Builds one training parameter from its exported tensors; see `from_format`."""
    return from_format("hf", name, load, arch)
