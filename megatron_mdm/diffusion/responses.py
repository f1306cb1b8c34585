"""Objectives of fine-tuning: the response is learned, given its prompt, and the prompt is not.

Every exchange weighs the same, however long its response is and whatever it shares a window with:
the loss of a response is divided by its own length, and that of a window by the number of exchanges
that a window of its source holds on average. A mean over windows is then one over exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, CausalAttention, FullAttention
from megatron_mdm.diffusion.masking import ForwardProcess, Masking
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose, TimeSampler, spread_times
from megatron_mdm.diffusion.samples import (
    SEGMENT_IDS,
    Exchange,
    HeldOutDraw,
    LossKind,
    Sample,
    SegmentArray,
    TextWindow,
    next_tokens,
    refuse_mask_token,
)


@dataclass(frozen=True)
class ResponseDiffusionObjective:
    """Fill in tokens of responses, at every rate from none to all; prompts are in full sight.

    Attributes:
        noise: Source of mask draws.
        times: Uniform draws that become times.
        mask_token_id: Input id that hides a token.
        forward: What hides tokens.
        prompt_dropout: Chance that an exchange's whole prompt is hidden, and still not learned, so
            that the model knows responses without prompts for classifier-free guidance.
        attention: Full, at least at the end.

    Source:
        arXiv 2410.18514, section 2 and its fine-tuning; the chance is drawn per exchange.
    """

    noise: CounterNoise
    times: TimeSampler
    mask_token_id: int
    forward: ForwardProcess
    prompt_dropout: float = 0.0
    attention: FullAttention = FULL_ATTENTION

    has_noise: ClassVar[bool] = True
    uses_mask_token: ClassVar[bool] = True
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

    def __call__(self, window: TextWindow, position: int) -> Sample:
        """Hides tokens of each response.

        Args:
            window: Clean tokens and the exchanges among them.
            position: Place in the global order, from 0.

        Returns:
            The sample; weights are 0 outside of responses.

        Raises:
            DataError: The window holds the mask token, which nothing can predict.
        """
        refuse_mask_token(window.tokens_S, self.mask_token_id, position)
        uniforms_S = self.noise.uniforms(Purpose.MASK, position, len(window.tokens_S))
        times = spread_times(self.times(position), len(window.exchanges))
        maskings = [
            self.forward(uniforms_S[exchange.response : exchange.learned_stop], time)
            for exchange, time in zip(window.exchanges, times, strict=True)
        ]
        return masked_responses(
            window, maskings, self.mask_token_id, self._hidden_prompts(window, position)
        )

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """Hides tokens of each response by the fixed-count form, and no prompts."""
        del kind
        maskings = draw.maskings([one.learned_stop - one.response for one in window.exchanges])
        return masked_responses(window, maskings, self.mask_token_id)

    def count_predictions(self, window: TextWindow) -> int:
        """Tokens of responses."""
        return count_learned(window)

    def mean_length(self, seq_length: int) -> float:
        """Windows are computed whole."""
        return seq_length

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """The mean masked share of what is learned."""
        del seq_length
        return self.forward.mean_share() * learned_share

    def _hidden_prompts(self, window: TextWindow, position: int) -> list[Exchange]:
        if self.prompt_dropout == 0.0:
            return []
        draws = self.noise.uniforms(Purpose.PROMPT, position, len(window.exchanges))
        return [
            exchange
            for exchange, draw in zip(window.exchanges, draws, strict=True)
            if draw < self.prompt_dropout
        ]


@dataclass(frozen=True)
class ResponsePredictionObjective:
    """Predict the next token of responses, given their prompts: the autoregressive counterpart."""

    has_noise: ClassVar[bool] = False
    uses_mask_token: ClassVar[bool] = False
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

    def __call__(self, window: TextWindow, position: int) -> Sample:
        """Pairs the tokens of each response with the ones before them.

        Args:
            window: Clean tokens and the exchanges among them.
            position: Place in the global order; without noise it does not matter.

        Returns:
            The sample; only tokens of responses are predicted.
        """
        del position
        return predicted_responses(window)

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The sample that is trained on, which has no randomness."""
        del kind, draw
        return predicted_responses(window)

    def count_predictions(self, window: TextWindow) -> int:
        """Tokens of responses."""
        return count_learned(window)

    @property
    def attention(self) -> FullAttention:
        """Causal."""
        return CausalAttention()

    def mean_length(self, seq_length: int) -> float:
        """Windows are computed whole."""
        return seq_length

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """All that is learned."""
        del seq_length
        return learned_share


def count_learned(window: TextWindow) -> int:
    """Counts the tokens of a window's responses that are learned."""
    return sum(one.learned_stop - one.response for one in window.exchanges)


def masked_responses(
    window: TextWindow,
    maskings: Sequence[Masking],
    mask_token_id: int,
    hidden_prompts: Sequence[Exchange] = (),
) -> Sample:
    """Applies a mask to each response of a window.

    Args:
        window: Clean tokens and their exchanges.
        maskings: For each exchange, over its learned tokens.
        mask_token_id: Input id that hides a token.
        hidden_prompts: Exchanges whose prompt is hidden too.

    Returns:
        The sample. Every exchange sees itself alone.
    """
    inputs_S = window.tokens_S.copy()
    weights_S = np.zeros(len(inputs_S), dtype=np.float32)
    for exchange, masking in zip(window.exchanges, maskings, strict=True):
        learned = slice(exchange.response, exchange.learned_stop)
        size = exchange.learned_stop - exchange.response
        inputs_S[learned][masking.mask_L] = mask_token_id
        weights_S[learned][masking.mask_L] = masking.weight / (size * window.exchanges_per_window)
    for exchange in hidden_prompts:
        inputs_S[exchange.start : exchange.response] = mask_token_id
    return _sample(window, inputs_S, window.tokens_S, weights_S)


def predicted_responses(window: TextWindow) -> Sample:
    """Next-token prediction of the responses of a window.

    Args:
        window: Clean tokens and their exchanges.

    Returns:
        The sample; each of a response's n tokens has the weight 1/n, over the exchanges of a
        window. Every exchange sees itself alone.
    """
    weights_S = np.zeros(len(window.tokens_S), dtype=np.float32)
    for exchange in window.exchanges:
        # A token is predicted at the one before it, of which every prompt has at least one.
        size = exchange.learned_stop - exchange.response
        predictors = slice(exchange.response - 1, exchange.learned_stop - 1)
        weights_S[predictors] = 1.0 / (size * window.exchanges_per_window)
    return _sample(window, window.tokens_S, next_tokens(window.tokens_S), weights_S)


def _sample(
    window: TextWindow, inputs_S: IntArray, targets_S: IntArray, weights_S: NDArray[np.float32]
) -> Sample:
    if len(window.exchanges) == 1:
        # A sample that ends early, if it does: attention has faster kernels for these.
        return Sample(inputs_S, targets_S, weights_S, window.exchanges[0].stop)
    segments = {SEGMENT_IDS: exchange_numbers(window)}
    return Sample(inputs_S, targets_S, weights_S, len(inputs_S), segments)


def exchange_numbers(window: TextWindow) -> SegmentArray:
    """Numbers the exchanges of a window, so that none sees another.

    Args:
        window: Tokens and their exchanges.

    Returns:
        int32 [S]: the exchange of each token, from 0; one more than the last for padding.
    """
    numbers_S = np.full(len(window.tokens_S), len(window.exchanges), dtype=np.int32)
    for number, exchange in enumerate(window.exchanges):
        numbers_S[exchange.start : exchange.stop] = number
    return numbers_S
