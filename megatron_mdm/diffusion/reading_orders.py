"""Orders in which AR reads windows: an ablation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose
from megatron_mdm.diffusion.samples import POSITION_IDS, Sample, TextWindow

# Keeps the orders apart from the draws of training and validation with the same seed.
READING_ORDER_DOMAIN = 2


@dataclass(frozen=True)
class ReadingOrders:
    """A few fixed orders, of which every sample draws one.

    Attributes:
        noise: Source of the draws.
        seed: Seed of the permutations.
        count: Orders: the text's own, and permutations that leave the first token where it is.

    Source:
        arXiv 2507.15857, ablations.
    """

    noise: CounterNoise
    seed: int
    count: int

    def choose(self, seq_length: int, position: int) -> IntArray:
        """The order of the sample at a position.

        Args:
            seq_length: Tokens of a window, S.
            position: Place in the global order, from 0.

        Returns:
            int64 [S]: which token stands at each place. Not to be written to.
        """
        order = int(self.noise.make_generator(Purpose.ORDER, position).integers(0, self.count))
        return draw_order(self.seed, order, seq_length)


def reorder(window: TextWindow, order_S: IntArray) -> TextWindow:
    """The window with its tokens in another order."""
    return window._replace(tokens_S=window.tokens_S[order_S])


def tell_order(sample: Sample, order_S: IntArray) -> Sample:
    """Adds to the sample of a reordered window the position of each token in the text."""
    return sample._replace(model_inputs={**sample.model_inputs, POSITION_IDS: order_S})


@functools.lru_cache(maxsize=1024)
def draw_order(seed: int, order: int, seq_length: int) -> IntArray:
    """One of the fixed orders in which AR may read a window.

    Args:
        seed: The run's seed.
        order: Number of the order; 0 is the text's own.
        seq_length: Tokens of a window, S.

    Returns:
        int64 [S], a permutation of 0..S-1 that begins with 0. Not to be written to.
    """
    position_ids_S = np.arange(seq_length, dtype=np.int64)
    if order > 0:
        generator = CounterNoise(seed, READING_ORDER_DOMAIN).make_generator(Purpose.ORDER, order)
        position_ids_S[1:] = generator.permutation(seq_length - 1) + 1
    position_ids_S.flags.writeable = False
    return position_ids_S
