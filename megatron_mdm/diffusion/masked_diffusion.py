"""Masked diffusion over whole windows: fill in tokens hidden at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, FullAttention
from megatron_mdm.diffusion.left_to_right import LeftToRight
from megatron_mdm.diffusion.lengths import LengthSampler
from megatron_mdm.diffusion.masking import ForwardProcess
from megatron_mdm.diffusion.noise import CounterNoise, Purpose, TimeSampler
from megatron_mdm.diffusion.samples import (
    HeldOutDraw,
    LossKind,
    Sample,
    TextWindow,
    masked_sample,
    places_after_first,
    refuse_mask_token,
)
from megatron_mdm.diffusion.schedules import LINEAR


@dataclass(frozen=True)
class MaskedDiffusionObjective:
    """Fill in tokens hidden at random, at every rate from none to all.

    Attributes:
        noise: Source of mask draws.
        times: Uniform draws that become times.
        lengths: Length of every position.
        mask_token_id: Input id that hides a token.
        forward: What hides tokens.
        left_to_right: Hides the last tokens of some samples instead, as many.
        attention: Full, at least at the end.
    """

    noise: CounterNoise
    times: TimeSampler
    lengths: LengthSampler
    mask_token_id: int
    forward: ForwardProcess
    left_to_right: LeftToRight
    attention: FullAttention = FULL_ATTENTION

    has_noise: ClassVar[bool] = True
    uses_mask_token: ClassVar[bool] = True
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll", "nll_given_first")

    def __call__(self, window: TextWindow, position: int) -> Sample:
        """Hides tokens of a window.

        Args:
            window: Clean tokens; their documents have no effect on the mask.
            position: Place in the global order, from 0.

        Returns:
            The sample; the target of a position is the token itself, without a shift.

        Raises:
            DataError: The window holds the mask token, which nothing can predict.

        Source:
            arXiv 2410.18514, equation 3, divided by the number of tokens.
        """
        refuse_mask_token(window.tokens_S, self.mask_token_id, position)
        length = self.lengths(len(window.tokens_S), position)
        uniforms_L = self.noise.uniforms(Purpose.MASK, position, length)
        masking = self.left_to_right(self.forward(uniforms_L, self.times(position)), position)
        return masked_sample(window, masking.mask_L, masking.weight / length, self.mask_token_id)

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """Hides tokens of a window by the fixed-count form, whatever the model trains with.

        It has the same expectation and less variance.

        Args:
            window: Clean tokens, and perhaps their documents.
            kind: `nll_given_first` never hides the first token of a document.
            draw: Noise of the sample.

        Returns:
            The sample; weights are 0 where nothing can be hidden.
        """
        length = len(window.tokens_S)
        places = np.arange(length) if kind == "nll" else places_after_first(window)
        mask_S, weight = np.zeros(length, dtype=np.bool_), 0.0
        if len(places):
            (masking,) = draw.maskings([len(places)])
            mask_S[places] = masking.mask_L
            weight = masking.weight / len(places)
        return masked_sample(window, mask_S, weight, self.mask_token_id)

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens."""
        return len(window.tokens_S)

    def mean_length(self, seq_length: int) -> float:
        """That of `lengths`."""
        return self.lengths.mean(seq_length)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """Expected share of a window's positions that are hidden.

        Args:
            seq_length: Tokens of a window, S.
            learned_share: 1: all tokens are learned.

        Returns:
            With M the mean length of a sample: ((1 - eps) m + eps) M / S with Bernoulli masks,
            where m is the mean masked share, 1/2 for the linear schedule. With fixed counts the
            mean count of M tokens over S: (M + 1) / (2 S) for l ~ U{1..L}, exactly; for other
            schedules the count of a sample of the mean length.
        """
        del learned_share
        length = self.mean_length(seq_length)
        if not self.forward.fixed_count:
            return self.forward.mean_share() * length / seq_length
        if self.forward.schedule == LINEAR:
            return (length + 1) / (2 * seq_length)
        return self.forward.schedule.mean_count(round(length)) / seq_length
