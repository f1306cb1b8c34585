"""Masked diffusion that hides the last tokens of some samples: an ablation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mdm.diffusion.masking import Masking
from megatron_mdm.diffusion.noise import CounterNoise, Purpose


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

    def __call__(self, masking: Masking, position: int) -> Masking:
        """The mask of the sample at a position.

        Args:
            masking: What was drawn for it.
            position: Place in the global order, from 0.

        Returns:
            That mask, or its counterpart at the end.
        """
        if self.ratio and self.noise.uniform(Purpose.DIRECTION, position) < self.ratio:
            return last_tokens_masking(masking)
        return masking


def last_tokens_masking(masking: Masking) -> Masking:
    """Moves a mask to the end: as many tokens are hidden, the last ones.

    Args:
        masking: Any draw; one that masks nothing stays as it is.

    Returns:
        The mask of a left-to-right prediction, with the weight of the draw.
    """
    mask_L = masking.mask_L
    first_hidden = len(mask_L) - np.count_nonzero(mask_L)
    return Masking(np.arange(len(mask_L)) >= first_hidden, masking.weight)
