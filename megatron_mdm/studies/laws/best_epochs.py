"""The best number of epochs by a fitted form, E*(U, N), and how far it is known.

A minimum that no run has passed is an extrapolation of a curve that still falls: such a fit, and
such a resample of it, say that the minimum is somewhere beyond, not where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, percentile_interval
from megatron_mdm.studies.laws.coordinates import PENALTY
from megatron_mdm.studies.laws.fitting import Fit
from megatron_mdm.studies.laws.forms import Array, Law
from megatron_mdm.studies.laws.overfitting import PenalizedLaw
from megatron_mdm.studies.laws.runs import REPEATS, Runs
from megatron_mdm.studies.laws.uncertainty import MOST_EPOCHS, Profile, profile_best_epochs

# Sizes and unique tokens that differ by less than this share are one.
_SAME = 0.01


@dataclass(frozen=True)
class BestEpochs:
    """The best number of epochs of one size on so many unique tokens.

    Attributes:
        num_parameters: N.
        unique_tokens: U.
        epochs: E*, at least 1; infinite where the loss does not rise within a million.
        loss: Expected there, nats per token; after a million epochs where E* is infinite.
        interval: Over resamples, open above where more than 2.5% of them have no run beyond its
            minimum; None without resamples.
        most_epochs: The most that a run of this N and U was trained for; None: there is none.
        profile: The profile of E*, where it was asked for.
    """

    num_parameters: float
    unique_tokens: float
    epochs: float
    loss: float
    interval: Interval | None = None
    most_epochs: float | None = None
    profile: Profile | None = None


@dataclass(frozen=True)
class EpochsExponents:
    """E* ~ U^a / N^b around the middle of the runs.

    Attributes:
        num_parameters: N there, the geometric mean of the runs'.
        unique_tokens: U there.
        unique_exponent: a.
        parameter_exponent: b.
        unique_interval: Of a, over resamples with a run beyond its minimum; None without them.
        parameter_interval: Of b.
    """

    num_parameters: float
    unique_tokens: float
    unique_exponent: float
    parameter_exponent: float
    unique_interval: Interval | None = None
    parameter_interval: Interval | None = None


@dataclass(frozen=True)
class EpochsAnalysis:
    """What a fitted form says of the number of epochs.

    Attributes:
        points: For each N and U that was asked for.
        exponents: How the best number of epochs moves; None where no run is beyond its minimum.
        num_beyond: Runs beyond their minimum by the fit.
        share_reached: Share of the resamples with a run beyond its minimum; None without any.
    """

    points: tuple[BestEpochs, ...]
    exponents: EpochsExponents | None
    num_beyond: int
    share_reached: float | None

    @property
    def warnings(self) -> list[str]:
        """What the runs leave open, a sentence each."""
        if self.num_beyond:
            return []
        return [
            "No run is beyond its minimum in epochs by this fit, so the best numbers of epochs are "
            "open above: train some runs longer, until their held-out loss rises."
        ]


def analyze_best_epochs(
    fit: Fit,
    runs: Runs,
    laws: Sequence[Law] = (),
    places: Sequence[tuple[float, float]] = (),
    profiled: Sequence[tuple[float, float]] = (),
) -> EpochsAnalysis:
    """Finds the best numbers of epochs of a fitted form.

    Args:
        fit: Of a form with a minimum.
        runs: What was fitted.
        laws: Resamples of the fit, for intervals.
        places: N and U of each point.
        profiled: N and U of further points whose E* is profiled too, which takes longer.

    Returns:
        The points, first those that are profiled, and the exponents.

    Raises:
        DataError: The form has no minimum.
    """
    law = fit.law
    if not isinstance(law, PenalizedLaw):
        raise DataError(
            f"The form {law.form} has no best number of epochs, its loss never rises: fit the form "
            "overfitting or data_constrained_overfitting."
        )
    # A penalty that ran off to nothing is none.
    reached = [one for one in laws if count_beyond(one, runs) and _is_told(fit, one)]
    num_beyond = count_beyond(law, runs) if _is_told(fit, law) else 0
    new = [one for one in places if not any(is_same_place(one, other) for other in profiled)]
    asked = [*profiled, *new]
    epochs_P = _epochs_of([law], asked)[0]
    spread_LP = np.concatenate(
        [_epochs_of(reached, asked), np.full((len(laws) - len(reached), len(asked)), np.inf)]
    )
    points = []
    for index, place in enumerate(asked):
        ends = percentile_interval(spread_LP[:, index]) if laws else None
        if ends is not None and not num_beyond:
            ends = Interval(ends.low, math.inf)
        along = profile_best_epochs(runs, fit, *place) if index < len(profiled) else None
        points.append(_point(law, runs, place, float(epochs_P[index]), ends, along))
    exponents = _exponents(law, runs, reached) if num_beyond else None
    share = len(reached) / len(laws) if laws else None
    return EpochsAnalysis(tuple(points), exponents, num_beyond, share)


def count_beyond(law: Law, runs: Runs) -> int:
    """Counts the runs of more epochs than a law thinks best for their N and U."""
    best = law.best_epochs(num_parameters=runs.num_parameters, unique_tokens=runs.unique_tokens)
    return int((runs.epochs > np.maximum(best, REPEATS)).sum())


def places_of(runs: Runs) -> list[tuple[float, float]]:
    """The different N and U of runs that repeat their data, in ascending order.

    Args:
        runs: Finished runs.

    Returns:
        N and U; values that differ by less than a hundredth are one.
    """
    places: list[tuple[float, float]] = []
    rows = runs.epochs > REPEATS
    pairs = zip(runs.unique_tokens[rows].tolist(), runs.num_parameters[rows].tolist(), strict=True)
    for unique, parameters in sorted(set(pairs)):
        if not any(is_same_place((parameters, unique), one) for one in places):
            places.append((parameters, unique))
    return places


def is_same_place(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two pairs of N and U are within a hundredth of each other."""
    return all(abs(math.log(a / b)) < _SAME for a, b in zip(one, other, strict=True))


def _point(
    law: Law,
    runs: Runs,
    place: tuple[float, float],
    epochs: float,
    ends: Interval | None,
    along: Profile | None,
) -> BestEpochs:
    parameters, unique = place
    at = unique * min(epochs, MOST_EPOCHS.high)
    loss = law.loss(num_parameters=parameters, num_tokens=at, unique_tokens=unique)
    pairs = zip(runs.num_parameters.tolist(), runs.unique_tokens.tolist(), strict=True)
    near = np.array([is_same_place(one, place) for one in pairs])
    most = float(runs.epochs[near].max()) if near.any() else None
    return BestEpochs(parameters, unique, epochs, float(loss), ends, most, along)


def _epochs_of(laws: Sequence[Law], places: Sequence[tuple[float, float]]) -> Array:
    """Best epochs of laws of one form, float64 [laws, places]."""
    if not laws or not places:
        return np.zeros((len(laws), len(places)))
    constants = np.array([law.values() for law in laws])[:, None]
    found = np.exp(type(laws[0]).log_best_epochs(constants, *np.array(places).T))
    return np.asarray(np.where(found <= MOST_EPOCHS.high, found, np.inf))


def _is_told(fit: Fit, law: Law) -> bool:
    return PENALTY not in fit.fitted or fit.coordinates.bounded(law, PENALTY) > 0


def _exponents(law: PenalizedLaw, runs: Runs, reached: Sequence[Law]) -> EpochsExponents:
    logs = (np.log(runs.num_parameters).mean(), np.log(runs.unique_tokens).mean())
    parameters, unique = (math.exp(one) for one in logs)

    of_laws = np.array([one.values() for one in (law, *reached)])
    found_L2 = type(law).best_epochs_exponents(of_laws, parameters, unique)
    ends: list[Interval | None] = [None, None]
    if reached:
        ends = [percentile_interval(column) for column in found_L2[1:].T]
    return EpochsExponents(parameters, unique, *found_L2[0].tolist(), *ends)
