"""How fast masked diffusion is where its texts are as likely as those of an autoregressive model.

Between two measured numbers of steps the loss is taken as linear in the logarithm of the speed;
beyond the measured ones nothing is said.

Letters: P points of a line, by rising speed; N texts; R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.statistics import (
    HIGH_QUANTILE,
    LOW_QUANTILE,
    Estimate,
    mean_with_standard_error,
)
from megatron_mdm.studies.papers.tradeoff import Measured, group_by_line, select_autoregressive

Verdict = Literal["matched", "better", "not_reached"]
_RESAMPLES = 2000


class Place(NamedTuple):
    """A place between two points of a line, or at one.

    Attributes:
        verdict: matched: the loss is the wanted one here; better: it is no higher even at the
            fastest point, which is the place; not_reached: it is higher at all points, and the
            place is the one of the lowest.
        left: Index of the slower point.
        weight: Of the faster point, the next one, in [0, 1).
    """

    verdict: Verdict
    left: int
    weight: float

    def at(self, values_P: NDArray[np.float64]) -> float:
        """A value of the line there."""
        if self.weight == 0:
            return float(values_P[self.left])
        return float(
            (1 - self.weight) * values_P[self.left] + self.weight * values_P[self.left + 1]
        )


class Match(NamedTuple):
    """A line of masked diffusion at the quality of an autoregressive way.

    Attributes:
        ar: The autoregressive way.
        line: Of masked diffusion.
        batch_size: Texts at once.
        verdict: See `Place`.
        steps: Steps on the two sides of the place; the same twice at a point.
        loss: Nats per token of masked diffusion there.
        relative_speed: Tokens per second there over those of `ar`; a lower bound where the verdict
            is better, and without a meaning of its own where it is not_reached.
        interval: Where it lies, with `CONFIDENCE`, over texts; None for an end where the quality
            is not reached.
        share_reached: Of the resamples in which the quality is reached.
        entropy: Of masked diffusion there, nats.
        num_texts: That all this is over.
        entropy_difference: `entropy` less that of `ar`, text by text.
    """

    ar: str
    line: str
    batch_size: int
    verdict: Verdict
    steps: tuple[int, int]
    loss: float
    relative_speed: float
    interval: tuple[float | None, float | None]
    share_reached: float
    entropy: float
    num_texts: int
    entropy_difference: Estimate


def find_place(losses_P: NDArray[np.float64], wanted: float) -> Place:
    """Looks for the fastest place of a line that is good enough.

    Args:
        losses_P: float64 [P], nats per token, by rising speed.
        wanted: Loss to be reached.

    Returns:
        The place.
    """
    good = np.flatnonzero(losses_P <= wanted)
    if not len(good):
        return Place("not_reached", int(losses_P.argmin()), 0.0)
    left = int(good[-1])
    if left == len(losses_P) - 1:
        return Place("better", left, 0.0)
    weight = (wanted - losses_P[left]) / (losses_P[left + 1] - losses_P[left])
    return Place("matched", left, float(weight))


def match_all(measured: Sequence[Measured], batch_sizes: Sequence[int], seed: int) -> list[Match]:
    """Compares every line of masked diffusion with every autoregressive way.

    Args:
        measured: Of both, from the same prompts in the same order.
        batch_sizes: That were timed.
        seed: Of the resamples.

    Returns:
        A match for each batch size, autoregressive way and line.
    """
    num_texts = len(measured[0].quality.entropies_N)
    # The same texts for all ways: what a prompt does to all of them is not noise.
    chosen_RN = np.random.default_rng(seed).integers(num_texts, size=(_RESAMPLES, num_texts))
    return [
        match_line(ar, line, batch_size, chosen_RN)
        for batch_size in batch_sizes
        for ar in select_autoregressive(measured)
        for line in group_by_line(measured).values()
    ]


def match_line(
    ar: Measured, line: Sequence[Measured], batch_size: int, chosen_RN: NDArray[np.int64]
) -> Match:
    """Compares a line with an autoregressive way.

    Args:
        ar: Sets the quality.
        line: Ways that differ in their number of steps alone.
        batch_size: Texts at once.
        chosen_RN: int64 [R, N], texts of each resample.

    Returns:
        The match.
    """
    points = sorted(line, key=lambda one: one.speed_over(ar, batch_size))
    logs_P = np.array([math.log(one.speed_over(ar, batch_size)) for one in points])
    losses_P = np.array([_loss(one) for one in points])
    place = find_place(losses_P, _loss(ar))
    resampled_PR = np.stack([_resampled(one, chosen_RN) for one in points])
    speeds, reached = [], 0
    for wanted, losses in zip(_resampled(ar, chosen_RN), resampled_PR.T, strict=True):
        found = find_place(losses, float(wanted))
        reached += found.verdict != "not_reached"
        # A quality that is not reached is worse than any speed at which it is.
        speeds.append(0.0 if found.verdict == "not_reached" else math.exp(found.at(logs_P)))
    low, high = np.quantile(speeds, [LOW_QUANTILE, HIGH_QUANTILE], method="inverted_cdf")
    entropies_PN = np.stack([one.quality.entropies_N for one in points])
    right = place.left + (place.weight > 0)
    entropies_N = (1 - place.weight) * entropies_PN[place.left] + place.weight * entropies_PN[right]
    return Match(
        ar=ar.way.name,
        line=points[0].way.line,
        batch_size=batch_size,
        verdict=place.verdict,
        steps=(points[place.left].way.num_steps or 0, points[right].way.num_steps or 0),
        loss=place.at(losses_P),
        relative_speed=math.exp(place.at(logs_P)),
        interval=(float(low) or None, float(high) or None),
        share_reached=reached / len(speeds),
        entropy=float(entropies_N.mean()),
        num_texts=len(entropies_N),
        entropy_difference=mean_with_standard_error(entropies_N - ar.quality.entropies_N),
    )


def _loss(one: Measured) -> float:
    return float(one.quality.losses.nats_N.sum() / one.quality.losses.tokens_N.sum())


def _resampled(one: Measured, chosen_RN: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nats per token of each resample, float64 [R]."""
    losses = one.quality.losses
    found_R: NDArray[np.float64] = losses.nats_N[chosen_RN].sum(1) / losses.tokens_N[chosen_RN].sum(
        1
    )
    return found_R
