"""How far a law is known: fits to runs drawn again, and profiles of single constants.

Letters as in `coordinates`; G points of a profile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, percentile_interval, student_reach
from megatron_mdm.studies.laws.coordinates import HUBER_WIDTH, PENALTY, Coordinates, descend
from megatron_mdm.studies.laws.fitting import Fit, refit, residuals
from megatron_mdm.studies.laws.forms import Array, Constant, Law
from megatron_mdm.studies.laws.overfitting import Minimum
from megatron_mdm.studies.laws.runs import Runs

# The density of residuals at 0 is read off the smallest of them, this share.
_CENTRAL_SHARE = 0.3
# A profile is first looked at so far up and down from the estimate (in its coordinate), and then
# closer, until so many of its points lie inside the interval.
_FARTHEST = math.log(1000.0)
_POINTS = 41
# Best numbers of epochs: beyond a million there is none.
MOST_EPOCHS = Constant("E*", 1.0, 1e6)
_INSIDE = 10
_CLOSER_LOOKS = 5
# An interval whose ends are further apart than this factor says little.
_WEAK_RATIO = 10.0


def bootstrap(runs: Runs, fit: Fit, num_resamples: int, seed: int = 0) -> list[Law]:
    """Fits again to runs drawn with replacement.

    Args:
        runs: What was fitted.
        fit: The fit.
        num_resamples: How often.
        seed: Of the draws.

    Returns:
        A law for each resample.
    """
    drawn = np.random.default_rng(seed).integers(len(runs), size=(num_resamples, len(runs)))
    return [refit(fit, runs.take(rows_R)).law for rows_R in drawn]


def constant_interval(fit: Fit, laws: Sequence[Law], name: str) -> Interval:
    """Where a constant lies, open where resamples ran off to where the search ends.

    Args:
        fit: The fit.
        laws: Its resamples.
        name: The constant.

    Returns:
        The percentile interval.
    """
    return percentile_interval([fit.coordinates.bounded(law, name) for law in laws])


@dataclass(frozen=True)
class Profile:
    """The lowest objective for each value of one constant, the other fitted ones refitted.

    Attributes:
        name: The constant.
        estimate: Its value in the fit.
        values: Values looked at, ascending.
        objectives: The lowest objective that was found for each.
        lowest: The lowest of them and of the fit's own.
        threshold: Objective above which a value is rejected, with `CONFIDENCE`.
        interval: The lowest and the highest value that are not rejected; infinite, or 0 at the low
            end, where the objective stays below the threshold as far as was looked.
    """

    name: str
    estimate: float
    values: tuple[float, ...]
    objectives: tuple[float, ...]
    lowest: float
    threshold: float
    interval: Interval

    @property
    def is_weakly_identified(self) -> bool:
        """Whether the interval has an open end, or its ends are more than tenfold apart."""
        low, high = self.interval
        return low <= 0 or not math.isfinite(high) or high / low > _WEAK_RATIO


def profile(
    runs: Runs, fit: Fit, name: str, reach: Interval | None = None, num_points: int = _POINTS
) -> Profile:
    """Fixes a constant at many values and refits the others.

    Args:
        runs: What was fitted.
        fit: The fit.
        name: A fitted constant.
        reach: Look from here to there. By default as far as the interval reaches, but not beyond a
            thousandth and a thousandfold.
        num_points: How many values to look at, at equal steps of the coordinate.

    Returns:
        The profile, with the interval of the likelihood-ratio rule: values at which
        `likelihood_ratio_factor` times the rise of the objective is below the quantile of
        F(1, R - F) at `CONFIDENCE`, F because the scale of the noise is estimated.

    Raises:
        DataError: The constant was not fitted.
    """
    if name not in fit.fitted:
        raise DataError(
            f"The profile of {name} needs a fit of it: the fitted constants are "
            f"{', '.join(fit.fitted)}."
        )
    return _profile(runs, fit, name, _Profiler.of_constant(runs, fit, name), reach, num_points)


def profile_best_epochs(
    runs: Runs,
    fit: Fit,
    num_parameters: float,
    unique_tokens: float,
    reach: Interval | None = None,
    num_points: int = _POINTS,
) -> Profile:
    """Puts the minimum in epochs of one size at many places and refits the others.

    Args:
        runs: What was fitted.
        fit: The fit, of a form with a minimum.
        num_parameters: N.
        unique_tokens: U.
        reach: As for `profile`.
        num_points: As for `profile`.

    Returns:
        The profile of the best number of epochs; its interval begins at 1 at the lowest.

    Raises:
        DataError: The scale of the penalty was not fitted.
    """
    if PENALTY not in fit.fitted:
        raise DataError(f"A profile of the best epochs needs a fit of {PENALTY}: do not hold it.")
    look = _Profiler.of_best_epochs(runs, fit, num_parameters, unique_tokens)
    found = _profile(runs, fit, "best_epochs", look, reach, num_points)
    low, high = found.interval
    return replace(found, interval=Interval(max(low, 1.0), high))


def _profile(
    runs: Runs, fit: Fit, name: str, look: _Profiler, reach: Interval | None, num_points: int
) -> Profile:
    # Of one degree above the line F is the square of Student's t.
    quantile = student_reach(1.0, len(runs) - len(fit.coordinates.free)) ** 2
    rise = quantile / likelihood_ratio_factor(fit, runs)
    low, high = look.farthest if reach is None else map(look.about.coordinate, reach)
    grid, sums = look.lowest(low, high, num_points)
    for _ in range(_CLOSER_LOOKS if reach is None else 0):
        (inside,) = np.nonzero(sums <= min(sums.min(), fit.objective) + rise)
        if len(inside) >= _INSIDE:
            break
        # One point further than the interval on either side.
        ends = (inside[0], inside[-1]) if len(inside) else (sums.argmin(), sums.argmin())
        low, high = grid[max(ends[0] - 1, 0)], grid[min(ends[1] + 1, num_points - 1)]
        grid, sums = look.lowest(low, high, num_points)
    lowest = min(float(sums.min()), fit.objective)
    return Profile(
        name,
        look.estimate,
        tuple(look.about.value(grid).tolist()),
        tuple(sums.tolist()),
        lowest,
        lowest + rise,
        _inside(grid, sums, lowest + rise, look.about),
    )


def likelihood_ratio_factor(fit: Fit, runs: Runs) -> float:
    """What turns a rise of the objective into a statistic that is about chi-squared with 1 degree.

    2 E[psi'] / E[psi^2], with psi the derivative of the Huber loss at the residuals: the ratio
    statistic of robust fits, which needs no belief in a distribution of the noise. The mean of
    psi^2 has R - F degrees of freedom. psi' is 1 within the Huber width and 0 beyond, so its mean
    is the density of residuals at 0 times twice the width; the density is read off the smallest
    30% of the absolute residuals. The F smallest do not count: a fit to absolute values passes
    through so many runs.

    Args:
        fit: With F free constants.
        runs: What was fitted.

    Returns:
        The factor, above 0.

    Source:
        P. J. Huber, Robust Statistics (1981), section 7.10; E. Ronchetti (1982).
    """
    num_free = len(fit.coordinates.free)
    sizes = np.sort(np.abs(residuals(fit.law, runs)))
    spread = float(np.square(np.minimum(sizes, HUBER_WIDTH)).sum()) / (len(runs) - num_free)
    counted = sizes[num_free:]
    reach = max(float(counted[math.ceil(_CENTRAL_SHARE * len(counted)) - 1]), HUBER_WIDTH)
    density = float((counted <= reach).mean()) / reach
    return 2 * density * HUBER_WIDTH / max(spread, 1e-30)


@dataclass(frozen=True)
class _Profiler:
    """Refits all constants but one, for many values of it or of what is derived from it.

    Attributes:
        runs: What was fitted.
        fit: The fit.
        about: The value that moves.
        estimate: Its value in the fit.
        hold: The coordinates that are left free at a value.
        farthest: Coordinates beyond which it is not looked at.
    """

    runs: Runs
    fit: Fit
    about: Constant
    estimate: float
    hold: Callable[[float], Coordinates]
    farthest: tuple[float, float]

    @classmethod
    def of_constant(cls, runs: Runs, fit: Fit, name: str) -> _Profiler:
        tied = ("parameter_exponent", "token_exponent")
        names = tied if fit.coordinates.tie_exponents and name in tied else (name,)
        about, estimate = fit.coordinates.form.constants()[name], float(getattr(fit.law, name))
        place = float(about.coordinate(estimate))
        farthest = place - _FARTHEST, place + _FARTHEST
        if name not in fit.coordinates.log_middles:
            farthest = _clip(farthest, about)

        def hold(value: float) -> Coordinates:
            return fit.coordinates.hold(dict.fromkeys(names, value))

        return cls(runs, fit, about, estimate, hold, farthest)

    @classmethod
    def of_best_epochs(cls, runs: Runs, fit: Fit, parameters: float, unique: float) -> _Profiler:
        best = fit.law.best_epochs(num_parameters=parameters, unique_tokens=unique)
        place = min(math.log(float(best)), math.log(MOST_EPOCHS.high))

        def hold(value: float) -> Coordinates:
            return fit.coordinates.put_minimum(Minimum(parameters, unique, value))

        farthest = _clip((place - _FARTHEST, place + _FARTHEST), MOST_EPOCHS)
        return cls(runs, fit, MOST_EPOCHS, float(best), hold, farthest)

    def lowest(self, low: float, high: float, num_points: int) -> tuple[Array, Array]:
        """Coordinates from one end to the other and the lowest objective at each, [G] both."""
        grid_G = np.linspace(low, high, num_points)
        found: list[Fit] = []
        for place in grid_G:
            coordinates = self.hold(float(self.about.value(place)))
            # What fits well at one value is a good start at its neighbours.
            near = [one.law for one in found[-1:]]
            found.append(refit(self.fit, self.runs, coordinates, near))
        sums_G = np.array([one.objective for one in found])
        after = found[-1].law
        for index in range(num_points - 2, -1, -1):
            coordinates = found[index].coordinates
            free_F, lowest = descend(coordinates, coordinates.of(after), self.runs)
            after = found[index].law
            if lowest < sums_G[index]:
                sums_G[index] = lowest
                after = coordinates.form.from_values(coordinates.constants(free_F))
        return grid_G, sums_G


def _clip(ends: tuple[float, float], about: Constant) -> tuple[float, float]:
    low, high = np.clip(ends, *map(about.coordinate, (about.low, about.high))).tolist()
    return low, high


def _inside(grid: Array, sums: Array, threshold: float, about: Constant) -> Interval:
    """The outermost values whose objective is below a threshold, between points by lines."""
    (inside,) = np.nonzero(sums <= threshold)
    if not len(inside):
        return Interval(0.0, math.inf)

    def crossing(index: int, outside: int) -> float:
        share = (threshold - sums[index]) / (sums[outside] - sums[index])
        return float(about.value(grid[index] + share * (grid[outside] - grid[index])))

    first, last = int(inside[0]), int(inside[-1])
    low = crossing(first, first - 1) if first > 0 else 0.0
    high = crossing(last, last + 1) if last < len(grid) - 1 else math.inf
    return Interval(low, high)
