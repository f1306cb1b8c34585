"""Intervals of estimates whose standard errors rest on few values.

A standard error of K values is itself an estimate. With few of them it is often too small, and 1.96
of it on both sides of a mean hold the truth less often than 95 times in 100; Student's quantile for
as many degrees of freedom as the error has makes up for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

CONFIDENCE = 0.95


def student_reach(
    standard_error: float, degrees_of_freedom: float, confidence: float = CONFIDENCE
) -> float:
    """How far an interval reaches to both sides of a mean.

    Args:
        standard_error: Of the mean.
        degrees_of_freedom: Of the standard error; infinite if it is known.
        confidence: How often such intervals should hold the truth, in (0, 1).

    Returns:
        In the unit of the error; 0 where that is 0, nan where nothing tells the error.
    """
    if standard_error == 0:
        return 0.0
    return standard_error * float(stdtrit(degrees_of_freedom, (1 + confidence) / 2))


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
