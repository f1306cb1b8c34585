"""A row of the table of parameters: what is to be said of one, in any layout and format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mdm.config import ModelConfig
from megatron_mdm.config.parameter_groups import ParameterRole

# What the names of a layer's parameters begin with, here and in the foreign formats.
LAYER = "decoder.layers.{}."
_FOREIGN_LAYERS = {
    "hf": "model.layers.{}.",
    "smdm": "transformer.h.{}.",
    "llada": "model.transformer.blocks.{}.",
    "gidd": "model.layers.{}.",
}


class Run(NamedTuple):
    """Rows of one of the matrices that stand one after another in a parameter.

    Attributes:
        matrix: Which matrix.
        num_rows: Its next rows.
    """

    matrix: int
    num_rows: int


@dataclass(frozen=True)
class Parameter:
    """A row of the table: a parameter, or one of every layer.

    Attributes:
        name: Global name; in a layer what follows `decoder.layers.N.`.
        shape: Of the whole, padding rows of the vocabulary included.
        names: Its name in each foreign format; in a layer what follows the format's prefix.
            `{a|b}` gives two names, where the format keeps its matrices apart. A format without an
            entry cannot hold it.
        role: What it is in the network; some optimizers treat hidden matrices as such.
        stage: Which pipeline stage holds it: the first, the last, or the one that has the layer.
        initial: The constant that it begins as, or the standard deviation of its initial values.
        split_dim: Dimension that is divided over tensor-parallel ranks; None: every rank holds all
            of it.
        blocks: Independent blocks along that dimension, each divided: every rank holds a part of
            gate and of up projection.
        runs: How its matrices stand in its rows; None: it is one.
        matrices: What the matrices of `runs` are, by number.
        vocabulary: Its rows are the vocabulary's, with or without one for the mask token, and then
            padding; None: it has no padding.
        decays: Takes part in weight decay.
        exists: Does a model have it?
    """

    name: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    names: Mapping[str, str]
    role: ParameterRole = "hidden"
    stage: Literal["first", "layers", "last"] = "layers"
    initial: float | Callable[[ModelConfig], float] = lambda model: model.weight_std
    split_dim: int | None = None
    blocks: int = 1
    runs: Callable[[ModelConfig], list[Run]] | None = None
    matrices: tuple[str, ...] = ()
    vocabulary: Literal["tokens", "tokens and mask"] | None = None
    decays: bool = True
    exists: Callable[[ModelConfig], bool] = lambda model: True

    def format_full_name(self, layer: int | None) -> str:
        """Its global name in a layer, or outside of the layers."""
        return (LAYER.format(layer) if self.stage == "layers" else "") + self.name

    def list_external_names(self, format_name: str, layer: int | None) -> list[str]:
        """Its names in a foreign format: one, or one for each matrix that it is made of."""
        prefix = _FOREIGN_LAYERS[format_name].format(layer) if self.stage == "layers" else ""
        before, opened, rest = self.names[format_name].partition("{")
        if not opened:
            return [prefix + before]
        choices, _, after = rest.partition("}")
        return [prefix + before + choice + after for choice in choices.split("|")]

    def size(self, model: ModelConfig) -> int:
        """Number of elements of the whole."""
        return math.prod(self.shape(model))

    def count_unpadded_rows(self, model: ModelConfig) -> int:
        """Counts its rows without padding."""
        if self.vocabulary is None:
            return self.shape(model)[0]
        rows = model.vocabulary_rows
        return max(rows, model.mask_id + 1) if self.vocabulary == "tokens and mask" else rows
