"""Parameters from training checkpoints to other formats and back, by the table of parameters.

A training parameter is cut along its first dimension into runs of rows. Splitting and joining read
the same runs, so they cannot disagree. All functions are pure and work on one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.tables import FORMATS, Format
from megatron_mdm.model.parameter import Parameter, Run
from megatron_mdm.model.parameters import (
    EMBEDDING,
    find_layer,
    find_parameter,
    find_parameter_shape,
)

# Reads the rows [start, stop) of an external tensor.
RowReader = Callable[[str, int, int], Tensor]

# Rows that are read at once.
_CHUNK_ROWS = 4096


class _Rows(NamedTuple):
    """Rows that stand together in a training parameter and in a tensor of a format."""

    tensor: int
    training: int
    external: int
    num_rows: int


def list_external_names(format_name: str, name: str) -> list[str]:
    """Names of one training parameter in a format.

    Args:
        format_name: A key of `FORMATS`.
        name: Name in a training checkpoint.

    Returns:
        One name, or those of the tensors that it is divided into there.
    """
    return find_parameter(name).list_external_names(FORMATS[format_name].names, find_layer(name))


def list_external_shapes(
    format_name: str, name: str, saved: SavedModel
) -> list[tuple[str, tuple[int, ...]]]:
    """Gives the names and shapes of one training parameter in a format.

    Args:
        format_name: A key of `FORMATS`.
        name: Name in a training checkpoint.
        saved: The model.

    Returns:
        Pairs of external name and shape.

    Raises:
        ConversionError: The model has no such parameter, or the format no place for it.
    """
    names, rows, shape = _divide(format_name, name, saved)
    num_rows = [0] * len(names)
    for run in rows:
        num_rows[run.tensor] += run.num_rows
    return [(one, (count, *shape[1:])) for one, count in zip(names, num_rows, strict=True)]


def to_format(
    format_name: str, name: str, tensor: Tensor, saved: SavedModel
) -> list[tuple[str, Tensor]]:
    """Converts one training parameter to its tensors in a format.

    Args:
        format_name: A key of `FORMATS`.
        name: Name in a training checkpoint.
        tensor: The full, unsharded parameter in Megatron's layout, any dtype.
        saved: The model.

    Returns:
        Pairs of external name and tensor; the tensors may be views of the input. Padding rows are
        left out, and so is the mask token's row where the format has none.

    Raises:
        ConversionError: The model has no such parameter, the format no place for it, or the shape
            is not the model's.
    """
    names, rows, shape = _divide(format_name, name, saved)
    _check_shape(name, tensor, shape)
    parts: list[list[Tensor]] = [[] for _ in names]
    for run in rows:
        parts[run.tensor].append(tensor[run.training : run.training + run.num_rows])
    tensors = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in parts]
    return list(zip(names, tensors, strict=True))


def from_format(format_name: str, name: str, read: RowReader, saved: SavedModel) -> Tensor:
    """Builds one training parameter from its external tensors, the inverse of `to_format`.

    Args:
        format_name: A key of `FORMATS`.
        name: Name in a training checkpoint.
        read: Reads rows of an external tensor, whose shape is known to be right.
        saved: The model.

    Returns:
        The full parameter in Megatron's layout and the dtype that `read` gives; a copy. Padding
        rows of the vocabulary are 0; a mask token that the format has no row for gets
        `make_new_row`.

    Raises:
        ConversionError: The model has no such parameter, or the format no place for it.
    """
    names, runs, shape = _divide(format_name, name, saved)
    whole = read(names[0], 0, 0).new_zeros(shape)
    for run in runs:
        for chunk in _cut_chunks(run.num_rows):
            part = read(names[run.tensor], run.external + chunk.start, run.external + chunk.stop)
            whole[run.training + chunk.start : run.training + chunk.stop] = part
    mask_id, num_external = saved.model.mask_id, sum(run.num_rows for run in runs)
    if name == EMBEDDING and mask_id >= num_external:
        # Rows of tokens alone: unused rows say nothing about tokens.
        chunks = _cut_chunks(min(saved.model.vocab_size, num_external))
        whole[mask_id] = make_new_row(read(names[0], chunk.start, chunk.stop) for chunk in chunks)
    return whole


def _cut_chunks(num_rows: int) -> Iterator[range]:
    """Rows in pieces, so that little more than the result is in memory."""
    for start in range(0, num_rows, _CHUNK_ROWS):
        yield range(start, min(start + _CHUNK_ROWS, num_rows))


def make_new_row(chunks: Iterable[Tensor]) -> Tensor:
    """Makes the row of a token that an embedding does not have yet.

    It is the mean row, which says least about which token stands there, scaled to the root mean
    square norm of the rows. Unscaled, it is much shorter than any row, and the first block's norm
    would amplify its noise.

    Args:
        chunks: The rows of the embedding, [rows, H] each.

    Returns:
        float64 [H].
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), 0.0
    for chunk in chunks:
        exact = chunk.double()
        count += len(exact)
        total = total + exact.sum(dim=0)
        squares += exact.square().sum().item()
    norm = total.norm().item()
    # Rows that cancel out, such as zeros, have no direction to scale.
    return total * (math.sqrt(squares / count) / norm) if norm > 0 else total


def _divide(
    format_name: str, name: str, saved: SavedModel
) -> tuple[list[str], list[_Rows], tuple[int, ...]]:
    """Finds a parameter's external names, where its rows stand there, and its own shape."""
    if format_name not in FORMATS:
        raise ConversionError(
            f"The format {format_name!r} does not exist: choose one of {', '.join(FORMATS)}."
        )
    model, format_ = saved.model, FORMATS[format_name]
    try:
        shape = find_parameter_shape(name, model)
    except KeyError:
        raise ConversionError(
            f"The parameter {name} is not one of this model ({model.num_layers} layers, "
            f"tie_embeddings={model.tie_embeddings}, qkv_bias={model.qkv_bias}, "
            f"qk_norm={model.qk_norm}, mlp={model.mlp}, mlp_bias={model.mlp_bias}): convert it "
            "with the configuration it was trained with."
        ) from None
    if (problem := format_.misfit(saved)) is not None:
        raise ConversionError(
            f"The format {format_name} cannot hold a model with {problem}: choose another format."
        )
    names = list_external_names(format_name, name)
    return names, list(_list_rows(find_parameter(name), len(names), format_, saved)), shape


def _list_rows(
    parameter: Parameter, num_tensors: int, format_: Format, saved: SavedModel
) -> Iterator[_Rows]:
    runs = [Run(0, parameter.count_unpadded_rows(saved.model))]
    if num_tensors > 1 and parameter.runs is not None:
        runs = parameter.runs(saved.model)
    elif parameter.name == EMBEDDING:
        runs = [Run(0, format_.embedding_rows(saved))]
    training, external = 0, [0] * num_tensors
    for tensor, num_rows in runs:
        yield _Rows(tensor, training, external[tensor], num_rows)
        training += num_rows
        external[tensor] += num_rows


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"The parameter {name} has the shape {tuple(tensor.shape)} where the model says "
            f"{shape}: convert it with the configuration it was trained with."
        )
