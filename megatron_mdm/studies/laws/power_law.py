"""Power laws through a few points: a line through logarithms, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.uncertainty import CONFIDENCE, Interval


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x^exponent.

    Attributes:
        scale: y at x = 1.
        exponent: The slope of log y in log x.
        num_points: How many points it was fitted to.
        center: Mean of log x of these points.
        center_error: Standard error of log y at the center; None of two points, which leave none.
        exponent_error: Standard error of the exponent; None of two points.
    """

    scale: float
    exponent: float
    num_points: int = 0
    center: float = 0.0
    center_error: float | None = None
    exponent_error: float | None = None

    def at(self, x: float) -> float:
        """The expected y."""
        return float(self.scale * x**self.exponent)

    @property
    def exponent_interval(self) -> Interval | None:
        """Where the exponent lies, by Student's t; None of two points."""
        if self.exponent_error is None:
            return None
        reach = self._quantile() * self.exponent_error
        return Interval(self.exponent - reach, self.exponent + reach)

    def interval_at(self, x: float) -> Interval | None:
        """Where the line lies at x, by Student's t; None of two points."""
        if self.exponent_error is None or self.center_error is None:
            return None
        distance = math.log(x) - self.center
        reach = self._quantile() * math.hypot(self.center_error, self.exponent_error * distance)
        return Interval(self.at(x) * math.exp(-reach), self.at(x) * math.exp(reach))

    def _quantile(self) -> float:
        return float(t_distribution.ppf((1 + CONFIDENCE) / 2, self.num_points - 2))


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms.

    Args:
        x: Positive, at least two of them different.
        y: Positive, as many.

    Returns:
        The law, with standard errors of three points or more.

    Raises:
        DataError: There are too few points, or one is not positive and finite.
    """
    for name, values in (("x", x), ("y", y)):
        wrong = [value for value in values if not 0 < value < math.inf]
        if wrong or len(values) != len(x):
            found = wrong[0] if wrong else f"{len(values)} values"
            raise DataError(f"A power law's {name} is {found}: give positive, finite numbers.")
    if len(set(x)) < 2:
        raise DataError(f"A power law needs two different points, not {len(set(x))}.")
    log_x, log_y = np.log(x), np.log(y)
    center = float(log_x.mean())
    spread = float(np.square(log_x - center).sum())
    exponent = float((log_x - center) @ log_y / spread)
    level = float(log_y.mean())
    scale = math.exp(level - exponent * center)
    if len(x) < 3:
        return PowerLaw(scale, exponent, len(x), center)
    rest = log_y - level - exponent * (log_x - center)
    noise = math.sqrt(float(rest @ rest) / (len(x) - 2))
    return PowerLaw(
        scale, exponent, len(x), center, noise / math.sqrt(len(x)), noise / math.sqrt(spread)
    )
