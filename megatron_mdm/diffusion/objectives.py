"""Objectives of pre-training: masked diffusion and next-token prediction over whole windows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import FinetuningConfig, ObjectiveConfig
from megatron_mdm.diffusion.masking import ForwardProcess, Masking, last_tokens_masking
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose, TimeSampler
from megatron_mdm.diffusion.responses import (
    ResponseDiffusionObjective,
    ResponsePredictionObjective,
)
from megatron_mdm.diffusion.samples import (
    POSITION_IDS,
    ModelInputs,
    Objective,
    Sample,
    TextWindow,
    masked_sample,
    next_token_sample,
    refuse_mask_token,
)
from megatron_mdm.diffusion.schedules import NoiseSchedule

# Keeps the orders apart from the draws of training and validation with the same seed.
READING_ORDER_DOMAIN = 2
_LEAST_KEY_DROPOUT = 1e-3
DROPPED_KEYS_SEED, DROPPED_KEYS_RATES = "dropped_keys_seed", "dropped_keys_rates"


@dataclass(frozen=True)
class LengthSampler:
    """Stochastic sequence length: now and then a sample is cut short.

    A model that saw short sequences can evaluate and generate them.

    Attributes:
        noise: Source of draws.
        ratio: Share of samples that are cut, in [0, 1].
        minimum: Shortest length.
    """

    noise: CounterNoise
    ratio: float
    minimum: int = 1

    def __call__(self, seq_length: int, position: int) -> int:
        """Length of the sample at a position.

        Args:
            seq_length: Tokens of a full window, S.
            position: Place in the global order, from 0.

        Returns:
            S, or with probability `ratio` a draw from U{minimum..S}.
        """
        if self.ratio == 0.0:
            return seq_length
        generator = self.noise.generator(Purpose.LENGTH, position)
        if generator.random() >= self.ratio:
            return seq_length
        return int(generator.integers(self.minimum, seq_length + 1))


@dataclass(frozen=True)
class MaskedDiffusionObjective:
    """Fill in tokens hidden at random, at every rate from none to all.

    Attributes:
        noise: Source of mask draws.
        times: Uniform draws that become times.
        lengths: Length of every position.
        mask_token_id: Input id that hides a token.
        forward: What hides tokens.
        left_to_right_ratio: Share of samples whose last tokens are hidden instead, as many.
    """

    noise: CounterNoise
    times: TimeSampler
    lengths: LengthSampler
    mask_token_id: int
    forward: ForwardProcess
    left_to_right_ratio: float = 0.0

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
            arXiv 2410.18514, equation 3, divided by the number of tokens; left to right:
            arXiv 2507.15857, ablations.
        """
        refuse_mask_token(window.tokens_S, self.mask_token_id, position)
        length = self.lengths(len(window.tokens_S), position)
        draw = self._draw(position, length)
        if self._is_left_to_right(position):
            draw = last_tokens_masking(draw)
        weight = draw.weight / length
        return masked_sample(window, draw.mask_L, weight, self.mask_token_id)

    def _draw(self, position: int, length: int) -> Masking:
        uniforms_L = self.noise.uniforms(Purpose.MASK, position, length)
        return self.forward(uniforms_L, self.times(position))

    def _is_left_to_right(self, position: int) -> bool:
        if self.left_to_right_ratio == 0.0:
            return False
        return self.noise.uniform(Purpose.DIRECTION, position) < self.left_to_right_ratio


@dataclass(frozen=True)
class AutoregressiveObjective:
    """Predict the next token of the document: a window's predictions, averaged over those.

    Attributes:
        lengths: Length of every position, at least 2.
        noise: Source of the draws below.
        num_orders: Orders in which a window may be read, of which every sample draws one: the
            text's own, and fixed permutations that leave the first token where it is.
        seed: Seed of the permutations.
        key_dropout: Who draws the rate, from U(1e-3, 1), at which earlier keys are dropped: every
            query its own, or every sample one for all its queries. None: none are dropped.
        key_dropout_ratio: Share of the queries, or of the samples, that lose keys.

    Source:
        arXiv 2507.15857, ablations; there a rate belongs to a query, and a share of the queries has
        one.
    """

    lengths: LengthSampler
    noise: CounterNoise
    num_orders: int = 1
    seed: int = 0
    key_dropout: Literal["query", "sample"] | None = None
    key_dropout_ratio: float = 1.0

    def __call__(self, window: TextWindow, position: int) -> Sample:
        """Pairs every token with its successor.

        Args:
            window: Clean tokens, at least 2, and perhaps their documents.
            position: Place in the global order, from 0.

        Returns:
            The sample; the last token has no target, nor has the last of a document.
        """
        more: dict[str, NDArray[Any]] = {}
        if self.num_orders > 1:
            order = int(self.noise.generator(Purpose.ORDER, position).integers(0, self.num_orders))
            more[POSITION_IDS] = reading_order(self.seed, order, len(window.tokens_S))
            window = window._replace(tokens_S=window.tokens_S[more[POSITION_IDS]])
        if self.key_dropout is not None:
            more |= self._dropped_keys(position)
        sample = next_token_sample(window, self.lengths(len(window.tokens_S), position))
        return sample._replace(model_inputs={**sample.model_inputs, **more})

    def _dropped_keys(self, position: int) -> ModelInputs:
        generator = self.noise.generator(Purpose.KEYS, position)
        rate = _LEAST_KEY_DROPOUT + (1.0 - _LEAST_KEY_DROPOUT) * generator.random()
        seed = int(generator.integers(0, 2**31))
        if self.key_dropout == "query":
            return dropped_keys(seed, _LEAST_KEY_DROPOUT, 1.0, self.key_dropout_ratio)
        is_chosen = generator.random() < self.key_dropout_ratio
        return dropped_keys(seed, rate, rate, float(is_chosen))


def dropped_keys(
    seed: int, least_rate: float, greatest_rate: float, share: float
) -> dict[str, NDArray[Any]]:
    """Model inputs that say which keys the queries of a sample do not see.

    Args:
        seed: Says which ones, with the places of query and key; below 2**31.
        least_rate: Least chance that a query does not see an earlier token, in [0, 1].
        greatest_rate: Greatest such chance, at least the least one. Each query has one of its own,
            uniform between the two.
        share: Share of the queries that do not see some, in [0, 1]; the others see all.

    Returns:
        `dropped_keys_seed`: int64 []; `dropped_keys_rates`: float32 [3], the last three arguments.
    """
    return {
        DROPPED_KEYS_SEED: np.array(seed, np.int64),
        DROPPED_KEYS_RATES: np.array([least_rate, greatest_rate, share], np.float32),
    }


@functools.lru_cache(maxsize=1024)
def reading_order(seed: int, order: int, seq_length: int) -> IntArray:
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
        generator = CounterNoise(seed, READING_ORDER_DOMAIN).generator(Purpose.ORDER, order)
        position_ids_S[1:] = generator.permutation(seq_length - 1) + 1
    position_ids_S.flags.writeable = False
    return position_ids_S


def build_objective(
    settings: ObjectiveConfig,
    *,
    seed: int,
    global_batch_size: int,
    mask_token_id: int,
    finetuning: FinetuningConfig | None = None,
) -> Objective:
    """The objective of a run.

    Args:
        settings: Kind and details.
        seed: The run's seed.
        global_batch_size: Samples an optimizer step, over which t is stratified.
        mask_token_id: Input id that hides a token.
        finetuning: Whether responses alone are learned, and how; None: they are not.

    Returns:
        A pure function from (window, position) to a sample.
    """
    noise = CounterNoise(seed)
    times = TimeSampler(noise, global_batch_size, settings.time_sampling == "low_discrepancy")
    lengths = LengthSampler(
        noise, settings.stochastic_length_ratio, minimum=2 if settings.kind == "ar" else 1
    )
    if settings.kind == "ar":
        if finetuning is not None and finetuning.enabled:
            return ResponsePredictionObjective()
        return AutoregressiveObjective(
            lengths,
            noise,
            num_orders=settings.num_orders,
            seed=seed,
            key_dropout=settings.key_dropout_rate_per if settings.key_dropout else None,
            key_dropout_ratio=settings.key_dropout_ratio,
        )
    forward = ForwardProcess(
        settings.masking == "fixed_count", settings.eps, noise_schedule(settings)
    )
    if finetuning is not None and finetuning.enabled:
        return ResponseDiffusionObjective(
            noise=noise,
            times=times,
            mask_token_id=mask_token_id,
            forward=forward,
            prompt_dropout=finetuning.prompt_dropout,
        )
    return MaskedDiffusionObjective(
        noise=noise,
        times=times,
        lengths=lengths,
        mask_token_id=mask_token_id,
        forward=forward,
        left_to_right_ratio=settings.left_to_right_ratio,
    )


def noise_schedule(settings: ObjectiveConfig) -> NoiseSchedule:
    """The noise schedule of a run.

    Args:
        settings: The objective's fields.

    Returns:
        Shares, times and weights.
    """
    return NoiseSchedule(
        settings.noise_schedule,
        settings.schedule_power,
        settings.t_min,
        settings.t_max,
        settings.weighting,
    )
