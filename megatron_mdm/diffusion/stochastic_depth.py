"""Stochastic depth: which blocks of the network a sample passes through in training.

A block is a whole layer, attention and feed-forward together. The draws are made with the sample
and travel with it, so every layout and every recomputation leaves out the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import Config
from megatron_mdm.diffusion.noise import CounterNoise, FloatArray, Purpose
from megatron_mdm.diffusion.samples import BLOCK_SCALES


@dataclass(frozen=True)
class StochasticDepth:
    """Draws which blocks the samples of a run leave out.

    Attributes:
        noise: Source of draws.
        rate: Chance of the last block to be left out, in [0, 1); it rises linearly from the input
            on, where it is 0.
        num_layers: Blocks of the network, L.

    Source:
        Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 4; scaled in training
        instead of in evaluation, as dropout is.
    """

    noise: CounterNoise
    rate: float
    num_layers: int

    @property
    def rates_L(self) -> FloatArray:
        """Each block's chance to be left out, float64 [L]."""
        return self.rate * np.arange(1, self.num_layers + 1) / self.num_layers

    def __call__(self, position: int) -> dict[str, NDArray[Any]]:
        """Draws what the network is told of the sample at a position.

        Args:
            position: Place in the global order, from 0.

        Returns:
            `block_scales`: float32 [L], what each block's change of the residual stream is
            multiplied with: 0 where the block is left out, or else 1 / (1 - its chance), so that it
            is 1 on average. A block's draw depends on seed, position and the block's number alone.
        """
        uniforms_L = self.noise.uniforms(Purpose.BLOCKS, position, self.num_layers)
        rates_L = self.rates_L
        scales_L = np.where(uniforms_L < rates_L, 0.0, 1.0 / (1.0 - rates_L))
        return {BLOCK_SCALES: scales_L.astype(np.float32)}


def build_stochastic_depth(config: Config) -> StochasticDepth | None:
    """Builds the stochastic depth of a run.

    Args:
        config: The run.

    Returns:
        None where no block is ever left out.
    """
    model = config.model
    if model.stochastic_depth == 0:
        return None
    return StochasticDepth(CounterNoise(config.run.seed), model.stochastic_depth, model.num_layers)
