"""Parameters from training checkpoints to other formats and back, by the tables.

All functions are pure and work on one parameter at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.architecture import Architecture
from megatron_mdm.hf.formats.tables import (
    EMBEDDING,
    FORMATS,
    PARAMETERS,
    Parameter,
    Row,
)

FORMAT_NAMES = tuple(FORMATS)

# Reads the rows [start, stop) of an external tensor.
RowReader = Callable[[str, int, int], Tensor]

# Rows that are read at once.
_CHUNK_ROWS = 4096

_PARAMETERS = {parameter.name: parameter for parameter in PARAMETERS}


def training_names(arch: Architecture) -> list[str]:
    """Lists the names of all training parameters in the order of a forward pass.

    Args:
        arch: The model's sizes; a tied model has no output layer.

    Returns:
        The names, each once.
    """
    existing = [parameter.name for parameter in PARAMETERS if parameter.exists(arch)]
    per_layer = [name for name in existing if "{i}" in name]
    first = existing.index(per_layer[0])
    layers = [name.format(i=i) for i in range(arch.num_layers) for name in per_layer]
    return existing[:first] + layers + existing[first + len(per_layer) :]


def training_shape(name: str, arch: Architecture) -> tuple[int, ...]:
    """Gives the shape of a training parameter, padding rows of the vocabulary included.

    Args:
        name: Name in a training checkpoint.
        arch: The model's sizes.

    Returns:
        The shape.

    Raises:
        ConversionError: The architecture has no such parameter.
    """
    return _find_parameter(name, arch)[0].shape(arch)


def external_shapes(
    format_name: str, name: str, arch: Architecture
) -> list[tuple[str, tuple[int, ...]]]:
    """Gives the names and shapes of one training parameter in a format.

    Args:
        format_name: One of `FORMAT_NAMES`.
        name: Name in a training checkpoint.
        arch: The model's sizes.

    Returns:
        Pairs of external name and shape.

    Raises:
        ConversionError: The architecture has no such parameter, or the format no place for it.
    """
    row, external_names = _find_row(format_name, name, arch)
    num_rows = [0] * len(external_names)
    for run in row.runs(arch):
        num_rows[run.tensor] += run.num_rows
    rest = training_shape(name, arch)[1:]
    return [
        (external, (rows, *rest)) for external, rows in zip(external_names, num_rows, strict=True)
    ]


def to_format(
    format_name: str, name: str, tensor: Tensor, arch: Architecture
) -> list[tuple[str, Tensor]]:
    """Converts one training parameter to its tensors in a format.

    Args:
        format_name: One of `FORMAT_NAMES`.
        name: Name in a training checkpoint.
        tensor: The full, unsharded parameter in Megatron's layout, any dtype.
        arch: The model's sizes.

    Returns:
        Pairs of external name and tensor; the tensors may be views of the input. Padding rows are
        left out, and so is the mask token's row where the format has none.

    Raises:
        ConversionError: The architecture has no such parameter, the format no place for it, or the
            shape is not the architecture's.
    """
    row, external_names = _find_row(format_name, name, arch)
    _check_shape(name, tensor, training_shape(name, arch))
    parts: list[list[Tensor]] = [[] for _ in external_names]
    for run in sorted(row.runs(arch), key=lambda run: run.external):
        parts[run.tensor].append(tensor[run.training : run.training + run.num_rows])
    tensors = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in parts]
    return list(zip(external_names, tensors, strict=True))


def from_format(
    format_name: str, name: str, load: Callable[[str], Tensor], arch: Architecture
) -> Tensor:
    """Builds one training parameter from its external tensors, the inverse of `to_format`.

    Args:
        format_name: One of `FORMAT_NAMES`.
        name: Name in a training checkpoint.
        load: Returns the tensor of an external name.
        arch: The model's sizes.

    Returns:
        The full parameter in Megatron's layout and the dtype of the external tensors. Padding rows
        of the vocabulary are 0; a mask token that the format has no row for gets `new_row`.

    Raises:
        ConversionError: The architecture has no such parameter, the format no place for it, or a
            shape is not the architecture's.
    """
    tensors: dict[str, Tensor] = {}
    for external, shape in external_shapes(format_name, name, arch):
        tensors[external] = load(external)
        _check_shape(external, tensors[external], shape)
    num_rows = training_shape(name, arch)[0]
    return rows_from_format(
        format_name,
        name,
        lambda external, start, stop: tensors[external][start:stop],
        arch,
        0,
        num_rows,
    )


def rows_from_format(
    format_name: str, name: str, read: RowReader, arch: Architecture, start: int, stop: int
) -> Tensor:
    """Builds some rows of a training parameter, reading only what they need.

    Args:
        format_name: One of `FORMAT_NAMES`.
        name: Name in a training checkpoint.
        read: Reads rows of an external tensor, whose shape is known to be right.
        arch: The model's sizes.
        start: First row of the training parameter.
        stop: Row after the last.

    Returns:
        The rows, in the dtype that `read` gives; a copy.

    Raises:
        ConversionError: The architecture has no such parameter, or the format no place for it.
    """
    row, external_names = _find_row(format_name, name, arch)
    runs = row.runs(arch)
    rest = training_shape(name, arch)[1:]
    rows = read(external_names[0], 0, 0).new_zeros(stop - start, *rest)
    for run in runs:
        offset = run.external - run.training
        last = min(stop, run.training + run.num_rows)
        # In pieces, so that little more than the result is in memory.
        for first in range(max(start, run.training), last, _CHUNK_ROWS):
            end = min(first + _CHUNK_ROWS, last)
            part = read(external_names[run.tensor], first + offset, end + offset)
            rows[first - start : end - start] = part
    if name == EMBEDDING and start <= arch.mask_token_id < stop:
        num_external = sum(run.num_rows for run in runs)
        if arch.mask_token_id >= num_external:
            # Rows that stand for no token say nothing of where tokens lie.
            num_tokens = min(arch.vocab_size, num_external)
            chunks = (
                read(external_names[0], first, min(first + _CHUNK_ROWS, num_tokens))
                for first in range(0, num_tokens, _CHUNK_ROWS)
            )
            rows[arch.mask_token_id - start] = new_row(chunks)
    return rows


def new_row(chunks: Iterable[Tensor]) -> Tensor:
    """Makes the row of a token that an embedding does not have yet.

    It is the mean row, the point that says least about which token stands there, stretched to the
    root mean square norm of the rows. The mean alone is much shorter than any row, so the first
    block's norm would blow up whatever is in it.

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
    # Nothing to stretch where the rows cancel out, as those of zeros do.
    return total * (math.sqrt(squares / count) / norm) if norm > 0 else total


def _find_parameter(name: str, arch: Architecture) -> tuple[Parameter, int | None]:
    match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..+)", name)
    layer = int(match[2]) if match else None
    parameter = _PARAMETERS.get(f"{match[1]}{{i}}{match[3]}" if match else name.replace("{", ""))
    too_deep = layer is not None and layer >= arch.num_layers
    if parameter is None or too_deep or not parameter.exists(arch):
        raise ConversionError(
            f"The parameter {name} is not one of this architecture ({arch.num_layers} layers, "
            f"tied={arch.tied}, qkv_bias={arch.qkv_bias}, qk_norm={arch.qk_norm}): convert it with "
            "the configuration it was trained with."
        )
    return parameter, layer


def _find_row(format_name: str, name: str, arch: Architecture) -> tuple[Row, list[str]]:
    """The row of a format's table and its external names in the parameter's layer."""
    if format_name not in FORMATS:
        raise ConversionError(
            f"The format {format_name!r} does not exist: choose one of {', '.join(FORMATS)}."
        )
    parameter, layer = _find_parameter(name, arch)
    misfit = FORMATS[format_name].misfit(arch)
    if misfit is not None:
        raise ConversionError(
            f"The format {format_name} cannot hold a model with {misfit}: choose another format."
        )
    row = next(row for row in FORMATS[format_name].rows if row.training == parameter.name)
    return row, [external.format(i=layer) for external in row.external]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"The parameter {name} has the shape {tuple(tensor.shape)} where the architecture "
            f"says {shape}: convert it with the configuration it was trained with."
        )
