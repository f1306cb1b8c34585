"""Means with standard errors and intervals of one level of confidence, for the whole package.

A standard error of K values is itself an estimate. With few of them it is often too small, and 1.96
of it on both sides of a mean hold the truth less often than 95 times in 100; Student's quantile for
as many degrees of freedom as the error has makes up for that.

Letters: N values, K draws per value, G clusters, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

# How often an interval should hold the truth; and the quantiles at its ends.
CONFIDENCE = 0.95
LOW_QUANTILE, HIGH_QUANTILE = round((1 - CONFIDENCE) / 2, 9), round((1 + CONFIDENCE) / 2, 9)
_LEAST_FOR_A_CUBIC = 16


class Interval(NamedTuple):
    """Where a number lies, with `CONFIDENCE` unless said otherwise.

    Attributes:
        low: Lower end; 0 if there is none.
        high: Upper end; infinity if there is none.
    """

    low: float
    high: float

    def format(self, form: str) -> str:
        """Both ends in a format, such as `3.0 to 7.0`."""
        return f"{self.low:{form}} to {self.high:{form}}"

    def describe(self) -> str:
        """In words, such as `3 to 7` or `above 3`."""
        if self.low <= 0 and not math.isfinite(self.high):
            return "no end found"
        if not math.isfinite(self.high):
            return f"above {self.low:.4g}"
        return f"below {self.high:.4g}" if self.low <= 0 else self.format(".4g")


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
        mean: The estimate, in the unit of what was averaged.
        standard_error: Its standard error; nan for a single sample.
    """

    mean: float
    standard_error: float


class ClusteredEstimate(NamedTuple):
    """A mean over values that come in clusters, such as windows of documents.

    Attributes:
        mean: The estimate, in the unit of what was averaged.
        standard_error: Its standard error if all values are independent; nan for one value.
        clustered_error: Its standard error if clusters are independent; nan for one cluster.
    """

    mean: float
    standard_error: float
    clustered_error: float


def mean_with_standard_error(
    values_N: NDArray[np.float64], times_NK: NDArray[np.float64] | None = None
) -> Estimate:
    """Mean of independent values.

    Where t is stratified, what a value owes to its t adds nothing to the error of the mean. The
    smooth part of it, a cubic in t, is taken out of the spread by least squares; what a cubic
    misses stays in, so the figure errs on the safe side.

    Args:
        values_N: float64 [N], each a mean over K draws.
        times_NK: float64 [N, K], the draws' t, stratified over all N K draws; None if there is no
            t, or it is independent.

    Returns:
        Mean and standard error; the plain standard error with fewer than 16 values.
    """
    mean, count = float(values_N.mean()), len(values_N)
    if count < 2:
        return Estimate(mean, math.nan)
    residual_N = _residuals(values_N, times_NK)
    return Estimate(mean, math.sqrt(float(residual_N @ residual_N) / (count - 1) / count))


def clustered_mean(
    values_N: NDArray[np.float64],
    clusters_N: NDArray[np.int64],
    times_NK: NDArray[np.float64] | None = None,
) -> ClusteredEstimate:
    """Mean of values that resemble each other within clusters, as windows of one document do.

    Args:
        values_N: As for `mean_with_standard_error`.
        clusters_N: int64 [N], number of each value's cluster.
        times_NK: As for `mean_with_standard_error`.

    Returns:
        The mean, with the error of `mean_with_standard_error`, and with that of clusters, which is
        the same if every value is a cluster of its own.

    Source:
        Liang and Zeger 1986, with the usual G / (G - 1) for G clusters.
    """
    mean, error = mean_with_standard_error(values_N, times_NK)
    _, number_N = np.unique(clusters_N, return_inverse=True)
    count = int(number_N.max()) + 1
    if count < 2:
        return ClusteredEstimate(mean, error, math.nan)
    sums_G = np.bincount(number_N, weights=_residuals(values_N, times_NK))
    clustered = math.sqrt(float(sums_G @ sums_G) * count / (count - 1)) / len(values_N)
    return ClusteredEstimate(mean, error, clustered)


def _residuals(
    values_N: NDArray[np.float64], times_NK: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """What a cubic in t leaves, scaled to the size of the errors that it stands for."""
    count = len(values_N)
    degree = 0 if times_NK is None or count < _LEAST_FOR_A_CUBIC else 3
    powers_NK = np.ones((count, 1)) if times_NK is None else times_NK
    basis_ND = np.stack([(powers_NK**power).mean(axis=1) for power in range(degree + 1)], axis=1)
    coefficients_D, _, rank, _ = np.linalg.lstsq(basis_ND, values_N, rcond=1e-10)
    residual_N = values_N - basis_ND @ coefficients_D
    return np.asarray(residual_N * math.sqrt((count - 1) / (count - int(rank))))


def degrees_of_mean(count: int, *, is_stratified: bool = False) -> int:
    """Degrees of freedom of the error of `mean_with_standard_error`, for intervals.

    Args:
        count: Values, N.
        is_stratified: Whether their times were given.

    Returns:
        N less the coefficients that were fitted; 0 for a single value.
    """
    return count - (4 if is_stratified and count >= _LEAST_FOR_A_CUBIC else 1)


def degrees_of_differences(count: int) -> float:
    """Degrees of freedom of a variance that is told by the differences of neighbours.

    Args:
        count: Values, K, at least 2.

    Returns:
        2 (K - 1)^2 / (3 K - 4), about two thirds of what deviations from the mean have: those of
        the chi-square distribution with the mean and the variance of this one.

    Source:
        von Neumann, Kent, Bellinson and Hart, "The mean square successive difference", 1941.
    """
    return 2 * (count - 1) ** 2 / (3 * count - 4)


def degrees_of_sum(standard_errors: Sequence[float], degrees: Sequence[float]) -> float:
    """Degrees of freedom of the standard error of a sum of independent estimates.

    Args:
        standard_errors: Of the estimates.
        degrees: Of freedom of each.

    Returns:
        The degrees; infinite if no error is above 0.

    Source:
        Welch 1947, Satterthwaite 1946.
    """
    variances = [error**2 for error in standard_errors]
    parts = [
        variance**2 / freedom
        for variance, freedom in zip(variances, degrees, strict=True)
        if variance
    ]
    total = math.fsum(parts)
    return math.fsum(variances) ** 2 / total if total else math.inf


def student_reach(standard_error: float, degrees_of_freedom: float) -> float:
    """How far an interval reaches to both sides of a mean.

    Args:
        standard_error: Of the mean.
        degrees_of_freedom: Of the standard error; infinite if it is known.

    Returns:
        In the unit of the error; 0 where that is 0, nan where nothing tells the error.
    """
    if standard_error == 0:
        return 0.0
    return standard_error * float(stdtrit(degrees_of_freedom, HIGH_QUANTILE))


def student_interval(mean: float, standard_error: float, degrees_of_freedom: float) -> Interval:
    """The interval around a mean: as far as `student_reach` says, to both sides."""
    reach = student_reach(standard_error, degrees_of_freedom)
    return Interval(mean - reach, mean + reach)


def wilson_interval(successes: int, total: int) -> Interval:
    """Where a share may lie, judged by a sample.

    Args:
        successes: How many were right.
        total: Of how many, at least 1.

    Returns:
        Both ends, within [0, 1], and of some width even where all or none were right.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = student_reach(1.0, math.inf)
    share, weight = successes / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def percentile_interval(values: ArrayLike) -> Interval:
    """The middle of a bootstrap's values, of which at least one is needed.

    Args:
        values: One per resample; infinite ones are ordered as such.

    Returns:
        The quantiles at both ends; beside an infinite value the next one further up.
    """
    low, high = percentile_band(values)
    return Interval(float(low), float(high))


def percentile_band(values: ArrayLike) -> NDArray[np.float64]:
    """Lower and upper ends over resamples: [resamples, ...] to [2, ...]."""
    numbers = np.asarray(values, dtype=np.float64)
    ends = (LOW_QUANTILE, HIGH_QUANTILE)
    # Between an infinite value and its neighbour a line has no meaning.
    with np.errstate(invalid="ignore"):
        band: NDArray[np.float64] = np.quantile(numbers, ends, axis=0)
    above = np.quantile(numbers, ends, axis=0, method="higher")
    return np.where(np.isfinite(band), band, above)


@dataclass(frozen=True)
class Line:
    """y = level + slope (x - center), by least squares.

    Attributes:
        center: Mean of the x that it was fitted to.
        level: y at the center.
        slope: Of y in x.
        level_error: Standard error of the level; None of two points, which leave none.
        slope_error: Standard error of the slope; None of two points.
        degrees: Degrees of freedom of both errors.
    """

    center: float
    level: float
    slope: float
    level_error: float | None = None
    slope_error: float | None = None
    degrees: int = 0

    def at(self, x: float) -> float:
        """The line's y at x."""
        return self.level + self.slope * (x - self.center)

    @property
    def slope_interval(self) -> Interval | None:
        """Where the slope lies, by Student's t; None of two points."""
        if self.slope_error is None:
            return None
        return student_interval(self.slope, self.slope_error, self.degrees)

    def interval_at(self, x: float) -> Interval | None:
        """Where the line lies at x, by Student's t; None of two points."""
        if self.slope_error is None or self.level_error is None:
            return None
        error = math.hypot(self.level_error, self.slope_error * (x - self.center))
        return student_interval(self.at(x), error, self.degrees)


def fit_line(x: ArrayLike, y: ArrayLike) -> Line:
    """Least squares through points.

    Args:
        x: [P], at least two of them different.
        y: [P].

    Returns:
        The line, with standard errors of three points or more.
    """
    x_P, y_P = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    center, level, degrees = float(x_P.mean()), float(y_P.mean()), len(x_P) - 2
    spread = float(np.square(x_P - center).sum())
    slope = float((x_P - center) @ y_P / spread)
    if degrees < 1:
        return Line(center, level, slope)
    rest_P = y_P - level - slope * (x_P - center)
    noise = math.sqrt(float(rest_P @ rest_P) / degrees)
    return Line(
        center, level, slope, noise / math.sqrt(len(x_P)), noise / math.sqrt(spread), degrees
    )
