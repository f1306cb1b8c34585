"""From a clean window of tokens to what the model sees and is asked for.

Both objectives produce the same `TrainingSample`, so the trainer does not know which one it runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import ObjectiveConfig
from megatron_mdm.diffusion.masking import (
    Masking,
    bernoulli_masking,
    fixed_count_masking,
    last_tokens_masking,
)
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose, TimeSampler
from megatron_mdm.diffusion.schedules import NoiseSchedule
from megatron_mdm.errors import DataError

DocumentArray = NDArray[np.int32]

# Keeps the orders apart from the draws of training and validation with the same seed.
READING_ORDER_DOMAIN = 2
_LEAST_KEY_DROPOUT = 1e-3


class KeyDropout(NamedTuple):
    """Keys that the queries of a sample do not see.

    Attributes:
        seed: Says which ones, with the places of query and key; below 2**31.
        rate: Chance that a query does not see an earlier token, in [0, 1].
    """

    seed: int
    rate: float


class TrainingSample(NamedTuple):
    """What one sample contributes to a step.

    Attributes:
        inputs_S: int64 [S], tokens that the model sees.
        targets_S: int64 [S], tokens that it should predict.
        weights_S: float32 [S]; `sum(weights * cross_entropy)` is the loss in nats per token.
        length: Tokens that count; the rest of the window is neither attended to nor predicted.
        documents_S: int32 [S], number of each token's document within the window, beyond which it
            does not see; None: attention spans the window.
        places_S: int64 [S], where in the text each token stands; None: in the order given.
        key_dropout: Keys that are dropped; None: none.
    """

    inputs_S: IntArray
    targets_S: IntArray
    weights_S: NDArray[np.float32]
    length: int
    documents_S: DocumentArray | None = None
    places_S: IntArray | None = None
    key_dropout: KeyDropout | None = None


class Objective(Protocol):
    """A training objective: a pure function of the window and its position."""

    def __call__(
        self, x0_S: IntArray, position: int, documents_S: DocumentArray | None = None
    ) -> TrainingSample:
        """Prepares the sample at a position of the global order."""
        ...


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
        fixed_count: Mask exactly l tokens instead of each with probability p.
        eps: Least masking probability of the Bernoulli form.
        schedule: Share that is masked at each time, and weights.
        left_to_right_ratio: Share of samples whose last tokens are hidden instead, as many.
    """

    noise: CounterNoise
    times: TimeSampler
    lengths: LengthSampler
    mask_token_id: int
    fixed_count: bool
    eps: float
    schedule: NoiseSchedule
    left_to_right_ratio: float = 0.0

    def __call__(
        self, x0_S: IntArray, position: int, documents_S: DocumentArray | None = None
    ) -> TrainingSample:
        """Hides tokens of a window.

        Args:
            x0_S: Clean tokens, int64 [S].
            position: Place in the global order, from 0.
            documents_S: int32 [S], number of each token's document; it has no effect on the mask.

        Returns:
            The sample; the target of a position is the token itself, without a shift.

        Raises:
            DataError: The window holds the mask token, which nothing can predict.

        Source:
            arXiv 2410.18514, equation 3, divided by the number of tokens; left to right:
            arXiv 2507.15857, ablations.
        """
        if (x0_S == self.mask_token_id).any():
            raise DataError(
                f"The training window at position {position} holds the mask token "
                f"model.mask_token_id={self.mask_token_id}, which text must not contain: leave "
                "model.mask_token_id out, or preprocess the corpus without that token."
            )
        length = self.lengths(len(x0_S), position)
        draw = self._draw(position, length)
        if self._is_left_to_right(position):
            draw = last_tokens_masking(draw)
        return masked_sample(
            x0_S, draw.mask_L, draw.weight / length, self.mask_token_id, documents_S
        )

    def _draw(self, position: int, length: int) -> Masking:
        uniforms_L = self.noise.uniforms(Purpose.MASK, position, length)
        t = self.schedule.time(self.times(position))
        if self.fixed_count:
            return fixed_count_masking(uniforms_L, t, self.schedule)
        return bernoulli_masking(uniforms_L, t, self.eps, self.schedule)

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
        key_dropout: Drop earlier keys, each with a rate that every sample draws from U(1e-3, 1).

    Source:
        arXiv 2507.15857, ablations.
    """

    lengths: LengthSampler
    noise: CounterNoise
    num_orders: int = 1
    seed: int = 0
    key_dropout: bool = False

    def __call__(
        self, x0_S: IntArray, position: int, documents_S: DocumentArray | None = None
    ) -> TrainingSample:
        """Pairs every token with its successor.

        Args:
            x0_S: Clean tokens, int64 [S], S at least 2.
            position: Place in the global order, from 0.
            documents_S: int32 [S], number of each token's document.

        Returns:
            The sample; the last token has no target, nor has the last of a document.
        """
        places_S = None
        if self.num_orders > 1:
            order = int(self.noise.generator(Purpose.ORDER, position).integers(0, self.num_orders))
            places_S = reading_order(self.seed, order, len(x0_S))
            x0_S = x0_S[places_S]
        sample = next_token_sample(x0_S, self.lengths(len(x0_S), position), documents_S)
        return sample._replace(places_S=places_S, key_dropout=self._dropped_keys(position))

    def _dropped_keys(self, position: int) -> KeyDropout | None:
        if not self.key_dropout:
            return None
        generator = self.noise.generator(Purpose.KEYS, position)
        rate = _LEAST_KEY_DROPOUT + (1.0 - _LEAST_KEY_DROPOUT) * generator.random()
        return KeyDropout(int(generator.integers(0, 2**31)), rate)


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
    places_S = np.arange(seq_length, dtype=np.int64)
    if order > 0:
        generator = CounterNoise(seed, READING_ORDER_DOMAIN).generator(Purpose.ORDER, order)
        places_S[1:] = generator.permutation(seq_length - 1) + 1
    places_S.flags.writeable = False
    return places_S


def masked_sample(
    x0_S: IntArray,
    mask_L: NDArray[np.bool_],
    weight: float,
    mask_token_id: int,
    documents_S: DocumentArray | None = None,
) -> TrainingSample:
    """Applies a mask to the first L tokens of a window.

    Args:
        x0_S: Clean tokens, int64 [S].
        mask_L: bool [L], True where hidden, L at most S.
        weight: Weight of each hidden token's cross-entropy.
        mask_token_id: Input id that hides a token.
        documents_S: int32 [S], number of each token's document, handed on.

    Returns:
        The sample, of length L.
    """
    mask_S = np.zeros(len(x0_S), dtype=np.bool_)
    mask_S[: len(mask_L)] = mask_L
    return TrainingSample(
        inputs_S=np.where(mask_S, mask_token_id, x0_S),
        targets_S=x0_S,
        weights_S=np.where(mask_S, weight, 0.0).astype(np.float32),
        length=len(mask_L),
        documents_S=documents_S,
    )


def next_token_sample(
    x0_S: IntArray, length: int, documents_S: DocumentArray | None = None
) -> TrainingSample:
    """Shifts a window by one for next-token prediction.

    Args:
        x0_S: Clean tokens, int64 [S].
        length: Tokens that count, 2 to S.
        documents_S: int32 [S], number of each token's document, whose last token predicts nothing;
            None: the window is one text.

    Returns:
        The sample, with one weight on each of its n predictions, 1/n. A window of documents of one
        token each has none: its weights are all 0.
    """
    predicts_S = np.arange(1, len(x0_S) + 1) < length
    if documents_S is not None:
        predicts_S[:-1] &= documents_S[1:] == documents_S[:-1]
    weight = 1.0 / max(int(predicts_S.sum()), 1)
    weights_S = np.where(predicts_S, weight, 0.0).astype(np.float32)
    return TrainingSample(x0_S, np.append(x0_S[1:], x0_S[:1]), weights_S, length, documents_S)


def build_objective(
    settings: ObjectiveConfig, *, seed: int, global_batch_size: int, mask_token_id: int
) -> Objective:
    """The objective of a run.

    Args:
        settings: Kind and details.
        seed: The run's seed.
        global_batch_size: Samples an optimizer step, over which t is stratified.
        mask_token_id: Input id that hides a token.

    Returns:
        A pure function from (window, position) to a sample.
    """
    noise = CounterNoise(seed)
    ratio = settings.stochastic_length_ratio
    if settings.kind == "ar":
        return AutoregressiveObjective(
            LengthSampler(noise, ratio, minimum=2),
            noise,
            num_orders=settings.num_orders,
            seed=seed,
            key_dropout=settings.key_dropout,
        )
    return MaskedDiffusionObjective(
        noise=noise,
        times=TimeSampler(noise, global_batch_size, settings.time_sampling == "low_discrepancy"),
        lengths=LengthSampler(noise, ratio),
        mask_token_id=mask_token_id,
        fixed_count=settings.masking == "fixed_count",
        eps=settings.eps,
        schedule=noise_schedule(settings),
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
