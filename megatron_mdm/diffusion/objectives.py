"""Objectives of pre-training: masked diffusion and next-token prediction over whole windows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import Config, FinetuningConfig, ObjectiveConfig
from megatron_mdm.diffusion.annealing import WideningAttention
from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, CausalAttention, FullAttention
from megatron_mdm.diffusion.key_dropout import CausalWithDroppedKeys, KeyDropout
from megatron_mdm.diffusion.masking import ForwardProcess, Masking, last_tokens_masking
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose, TimeSampler
from megatron_mdm.diffusion.responses import (
    ResponseDiffusionObjective,
    ResponsePredictionObjective,
)
from megatron_mdm.diffusion.samples import (
    POSITION_IDS,
    HeldOutDraw,
    LossKind,
    Objective,
    Sample,
    TextWindow,
    masked_sample,
    next_token_sample,
    places_after_first,
    refuse_mask_token,
)
from megatron_mdm.diffusion.schedules import LINEAR, NoiseSchedule

# Keeps the orders apart from the draws of training and validation with the same seed.
READING_ORDER_DOMAIN = 2


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

    def mean(self, seq_length: int) -> float:
        """Expected length.

        Args:
            seq_length: Tokens of a full window, S.

        Returns:
            (1 - r) S + r (m + S) / 2, for the share r of samples that are cut and the shortest
            length m.

        Source:
            arXiv 2410.18514: 2048 (1 - r) + 1024.5 r.
        """
        shortened = (self.minimum + seq_length) / 2
        return seq_length * (1 - self.ratio) + self.ratio * shortened


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
        attention: Full, at least at the end.
    """

    noise: CounterNoise
    times: TimeSampler
    lengths: LengthSampler
    mask_token_id: int
    forward: ForwardProcess
    left_to_right_ratio: float = 0.0
    attention: FullAttention = FULL_ATTENTION

    has_noise: ClassVar[bool] = True
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
        key_dropout: Draws the keys that queries lose; None: they lose none.

    Source:
        arXiv 2507.15857, ablations.
    """

    lengths: LengthSampler
    noise: CounterNoise
    num_orders: int = 1
    seed: int = 0
    key_dropout: KeyDropout | None = None

    has_noise: ClassVar[bool] = False
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

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
            more |= self.key_dropout.model_inputs(position)
        sample = next_token_sample(window, self.lengths(len(window.tokens_S), position))
        return sample._replace(model_inputs={**sample.model_inputs, **more})

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The window in its own order, with all keys."""
        del kind, draw
        return next_token_sample(window, len(window.tokens_S))

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens but the first of each document."""
        return len(places_after_first(window))

    @property
    def attention(self) -> FullAttention:
        """Causal, perhaps without some keys."""
        return CausalAttention() if self.key_dropout is None else CausalWithDroppedKeys()

    def mean_length(self, seq_length: int) -> float:
        """That of `lengths`."""
        return self.lengths.mean(seq_length)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """All tokens of a sample but one, over those of a window."""
        del learned_share
        return (self.mean_length(seq_length) - 1) / seq_length


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
            key_dropout=_key_dropout(settings, noise),
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
            attention=_widening(settings),
        )
    return MaskedDiffusionObjective(
        noise=noise,
        times=times,
        lengths=lengths,
        mask_token_id=mask_token_id,
        forward=forward,
        left_to_right_ratio=settings.left_to_right_ratio,
        attention=_widening(settings),
    )


def _widening(settings: ObjectiveConfig) -> FullAttention:
    steps = settings.attention_annealing_steps
    return WideningAttention(steps) if steps else FULL_ATTENTION


def _key_dropout(settings: ObjectiveConfig, noise: CounterNoise) -> KeyDropout | None:
    if not settings.key_dropout:
        return None
    return KeyDropout(noise, settings.key_dropout_rate_per, settings.key_dropout_ratio)


def objective_of(config: Config) -> Objective:
    """The objective of a run.

    Args:
        config: The run.

    Returns:
        What its sections `objective` and `finetuning` say.
    """
    return build_objective(
        config.objective,
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        mask_token_id=config.model.mask_id,
        finetuning=config.finetuning,
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
