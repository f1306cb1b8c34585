"""Which parameters N counts, with embeddings or without, so that every figure can say it.

The two published families count differently, and 6 N D differs with them: by a factor of 12 for the
smallest model. So a law, a family of presets, a budget and a table of runs each say which N is
meant, and a model's size is always both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

ParameterConvention = Literal["with_embeddings", "without_embeddings"]
CONVENTIONS: tuple[ParameterConvention, ...] = get_args(ParameterConvention)


class ModelSize(NamedTuple):
    """N of a model, counted both ways.

    Attributes:
        with_embeddings: As the data-constrained family counts; see `model_size` of
            `model/accounting.py`.
        without_embeddings: Transformer layers and final norm.
    """

    with_embeddings: float
    without_embeddings: float

    def count_in(self, convention: ParameterConvention) -> float:
        """N by one of the conventions."""
        return self.with_embeddings if convention == "with_embeddings" else self.without_embeddings

    def convert_flops(
        self, flops: float, source: ParameterConvention, target: ParameterConvention
    ) -> float:
        """6 N D of this model, for as many tokens, with N counted otherwise.

        Args:
            flops: 6 N D, N counted as `source` says.
            source: How it was counted.
            target: How it shall be counted.

        Returns:
            FLOPs; the same number where both are one convention.
        """
        if source == target:
            return flops
        return flops * self.count_in(target) / self.count_in(source)


def describe_convention(convention: ParameterConvention) -> str:
    """A convention as text: `with embeddings`, `without embeddings`."""
    return convention.replace("_", " ")
