"""Masked diffusion that hides the last tokens of some samples: an ablation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mdm.diffusion.forward_process import Corruption
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose


@dataclass(frozen=True)
class LeftToRight:
    """Hides as many tokens as were drawn, but the last ones, in a share of the samples.

    Attributes:
        noise: Source of the draws.
        ratio: Share of samples, in [0, 1].

    Source:
        arXiv 2507.15857, ablations.
    """

    noise: CounterNoise
    ratio: float

    def __call__(self, corruption: Corruption, x0_L: IntArray, position: int) -> Corruption:
        """The corruption of the sample at a position.

        Args:
            corruption: What was drawn for it.
            x0_L: Clean tokens, int64 [L].
            position: Place in the global order, from 0.

        Returns:
            That corruption, or its counterpart at the end.
        """
        if self.ratio and self.noise.uniform(Purpose.DIRECTION, position) < self.ratio:
            return hide_last_tokens(corruption, x0_L)
        return corruption


def hide_last_tokens(corruption: Corruption, x0_L: IntArray) -> Corruption:
    """Hides the last tokens instead, as many.

    Args:
        corruption: Of absorbing diffusion; one that hides nothing stays as it is.
        x0_L: Clean tokens, int64 [L].

    Returns:
        The corruption of a left-to-right prediction, with the weights that were drawn.
    """
    xt_L, weights_L = corruption.xt_L, corruption.weights_L
    hidden_L = weights_L != 0
    count = np.count_nonzero(hidden_L)
    if not count:
        return corruption
    moved = Corruption(x0_L.copy(), np.zeros_like(weights_L), model_inputs=corruption.model_inputs)
    moved.xt_L[-count:] = xt_L[hidden_L]
    moved.weights_L[-count:] = weights_L[hidden_L]
    return moved
