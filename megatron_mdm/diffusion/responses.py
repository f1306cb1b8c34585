"""Objectives of fine-tuning: responses are learned, given their prompts; prompts are not learned.

Every prompt-response pair weighs the same: the loss of a response is divided by its length, and
that of a window by the mean number of pairs per window of its source. So the mean over windows is
the mean over pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.attention_rules import (
    CAUSAL_ATTENTION,
    FULL_ATTENTION,
    FullAttention,
)
from megatron_mdm.diffusion.forward_process import Corruption, ForwardProcess
from megatron_mdm.diffusion.noise import (
    CounterNoise,
    FloatArray,
    IntArray,
    Purpose,
    TimeSampler,
    spread_times,
)
from megatron_mdm.diffusion.samples import (
    SEGMENT_IDS,
    HeldOutDraw,
    LossKind,
    ModelInputs,
    Objective,
    PromptResponseSpan,
    Sample,
    SegmentArray,
    TextWindow,
    refuse_mask_token,
    shift_tokens,
    spread_loss_inputs,
)


@dataclass(frozen=True)
class ResponseDiffusionObjective(Objective):
    """Restore corrupted tokens of responses, at every rate; prompts are in full sight.

    Attributes:
        noise: Source of draws.
        times: Time of every position.
        process: What corrupts tokens.
        mask_token_id: Input id that hides a token.
        prompt_dropout: Chance that a pair's whole prompt is hidden, and still not learned, so
            that the model knows responses without prompts for classifier-free guidance.
        attention: Full, at least at the end.
        repeats_noise: Are the draws those of the window, not of the visit?

    Source:
        arXiv 2410.18514, section 2 and its fine-tuning; the chance is drawn per pair.
    """

    noise: CounterNoise
    times: TimeSampler
    process: ForwardProcess
    mask_token_id: int
    prompt_dropout: float = 0.0
    attention: FullAttention = FULL_ATTENTION
    repeats_noise: bool = False

    has_noise: ClassVar[bool] = True

    @property
    def uses_mask_token(self) -> bool:
        """Hidden prompts need it too."""
        return self.process.uses_mask_token or self.prompt_dropout > 0.0

    def sample(self, window: TextWindow, position: int) -> Sample:
        """Corrupts tokens of each response.

        Args:
            window: Clean tokens and the pairs among them.
            position: Place in the global order, from 0.

        Returns:
            The sample; weights are 0 outside of responses.

        Raises:
            DataError: The window holds the mask token, which nothing can predict.
        """
        if self.uses_mask_token:
            refuse_mask_token(window.tokens_S, self.mask_token_id, position)
        width = self.process.uniforms_per_token
        uniforms_N = self.noise.uniforms(Purpose.MASK, position, width * len(window.tokens_S))
        times = spread_times(self.times(position), len(window.pairs))
        corruptions = [
            self.process.corrupt(
                window.tokens_S[one.response : one.learned_stop],
                time,
                uniforms_N[width * one.response : width * one.learned_stop],
            )
            for one, time in zip(window.pairs, times, strict=True)
        ]
        return insert_corruptions(
            window, corruptions, self._draw_hidden_prompts(window, position), self.mask_token_id
        )

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """Corrupts each response as the process does on held-out text, and hides no prompts."""
        del kind
        return insert_corruptions(window, corrupt_held_out_responses(window, self.process, draw))

    def count_predictions(self, window: TextWindow) -> int:
        """Tokens of responses."""
        return count_learned(window)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """The mean predicted share of what is learned."""
        del seq_length
        return self.process.mean_share() * learned_share

    def _draw_hidden_prompts(self, window: TextWindow, position: int) -> list[PromptResponseSpan]:
        if self.prompt_dropout == 0.0:
            return []
        draws = self.noise.uniforms(Purpose.PROMPT, position, len(window.pairs))
        return [
            pair
            for pair, draw in zip(window.pairs, draws, strict=True)
            if draw < self.prompt_dropout
        ]


class ResponsePredictionObjective(Objective):
    """Predict the next token of responses, given their prompts: the autoregressive counterpart."""

    def sample(self, window: TextWindow, position: int) -> Sample:
        """Pairs the tokens of each response with the ones before them.

        Args:
            window: Clean tokens and the pairs among them.
            position: Place in the global order; without noise it does not matter.

        Returns:
            The sample; only tokens of responses are predicted.
        """
        del position
        return predict_responses(window)

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The same sample as in training, which has no noise."""
        del kind, draw
        return predict_responses(window)

    def count_predictions(self, window: TextWindow) -> int:
        """Tokens of responses."""
        return count_learned(window)

    @property
    def attention(self) -> FullAttention:
        """Causal."""
        return CAUSAL_ATTENTION

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """All that is learned."""
        del seq_length
        return learned_share


def count_learned(window: TextWindow) -> int:
    """Counts the tokens of a window's responses that are learned."""
    return sum(one.learned_stop - one.response for one in window.pairs)


def corrupt_held_out_responses(
    window: TextWindow, process: ForwardProcess, draw: HeldOutDraw
) -> list[Corruption]:
    """Corrupts the responses of a window that is judged, at times that are spread evenly.

    Args:
        window: Clean tokens and their pairs.
        process: What corrupts tokens.
        draw: Noise of the window.

    Returns:
        For each pair, over its learned tokens.
    """
    times = spread_times(draw.time, len(window.pairs))
    width = process.uniforms_per_token
    sizes = [width * (one.learned_stop - one.response) for one in window.pairs]
    parts: list[FloatArray] = np.split(draw.uniforms(sum(sizes)), np.cumsum(sizes)[:-1])
    return [
        process.corrupt_held_out(window.tokens_S[one.response : one.learned_stop], time, part)
        for one, time, part in zip(window.pairs, times, parts, strict=True)
    ]


def insert_corruptions(
    window: TextWindow,
    corruptions: Sequence[Corruption],
    hidden_prompts: Sequence[PromptResponseSpan] = (),
    mask_token_id: int = 0,
) -> Sample:
    """Inserts a corruption of each response into a window.

    Args:
        window: Clean tokens and their pairs.
        corruptions: For each pair, over its learned tokens.
        hidden_prompts: Pairs whose prompt is hidden too.
        mask_token_id: Input id that hides a prompt.

    Returns:
        The sample. Every pair sees itself alone.
    """
    inputs_S = window.tokens_S.copy()
    weights_S = np.zeros(len(inputs_S), dtype=np.float32)
    placed = []
    for pair, corruption in zip(window.pairs, corruptions, strict=True):
        learned = np.arange(pair.response, pair.learned_stop)
        placed.append((corruption, learned))
        size = pair.learned_stop - pair.response
        inputs_S[learned] = corruption.xt_L
        weights_S[learned] = corruption.weights_L / (size * window.pairs_per_window)
    for pair in hidden_prompts:
        inputs_S[pair.start : pair.response] = mask_token_id
    sample = _make_sample(window, inputs_S, window.tokens_S, weights_S)
    return sample._replace(
        model_inputs={**sample.model_inputs, **_spread_model_inputs(window, corruptions)},
        loss_inputs=spread_loss_inputs(placed, len(inputs_S)),
    )


def _spread_model_inputs(window: TextWindow, corruptions: Sequence[Corruption]) -> ModelInputs:
    """What the model is told of each pair, at all of its tokens: float32 [S] by name."""
    told: dict[str, NDArray[np.float32]] = {}
    for pair, corruption in zip(window.pairs, corruptions, strict=True):
        for name, value in corruption.model_inputs.items():
            values_S = told.setdefault(name, np.zeros(len(window.tokens_S), np.float32))
            values_S[pair.start : pair.stop] = value
    return told


def predict_responses(window: TextWindow) -> Sample:
    """Makes a sample that predicts the responses of a window token by token.

    Args:
        window: Clean tokens and their pairs.

    Returns:
        The sample; each of a response's n tokens has the weight 1/n, over the pairs of a
        window. Every pair sees itself alone.
    """
    weights_S = np.zeros(len(window.tokens_S), dtype=np.float32)
    for pair in window.pairs:
        # A token is predicted at the one before it, of which every prompt has at least one.
        size = pair.learned_stop - pair.response
        predictors = slice(pair.response - 1, pair.learned_stop - 1)
        weights_S[predictors] = 1.0 / (size * window.pairs_per_window)
    return _make_sample(window, window.tokens_S, shift_tokens(window.tokens_S), weights_S)


def _make_sample(
    window: TextWindow, inputs_S: IntArray, targets_S: IntArray, weights_S: NDArray[np.float32]
) -> Sample:
    if len(window.pairs) == 1:
        # A sample that ends early, if it does: attention has faster kernels for these.
        return Sample(inputs_S, targets_S, weights_S, window.pairs[0].stop)
    segments = {SEGMENT_IDS: number_pairs(window)}
    return Sample(inputs_S, targets_S, weights_S, len(inputs_S), segments)


def number_pairs(window: TextWindow) -> SegmentArray:
    """Numbers the pairs of a window, so that none sees another.

    Args:
        window: Tokens and their pairs.

    Returns:
        int32 [S]: the pair of each token, from 0; one more than the last for padding.
    """
    numbers_S = np.full(len(window.tokens_S), len(window.pairs), dtype=np.int32)
    for number, pair in enumerate(window.pairs):
        numbers_S[pair.start : pair.stop] = number
    return numbers_S
