"""Power laws through a few points: a line through logarithms, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, Line, fit_line


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x^exponent.

    Attributes:
        scale: y at x = 1.
        exponent: The slope of log y in log x.
        line: The line through logarithms that it is; None where it was not fitted.
    """

    scale: float
    exponent: float
    line: Line | None = None

    def at(self, x: float) -> float:
        """The expected y."""
        return float(self.scale * x**self.exponent)

    @property
    def exponent_interval(self) -> Interval | None:
        """Where the exponent lies, by Student's t; None of two points."""
        return None if self.line is None else self.line.slope_interval

    @property
    def exponent_text(self) -> str:
        """The exponent, with its interval where there is one."""
        ends = self.exponent_interval
        return f"{self.exponent:.4f}" + (f" ({ends.format('.4f')})" if ends else "")

    def interval_at(self, x: float) -> Interval | None:
        """Where the line lies at x, by Student's t; None of two points."""
        found = None if self.line is None else self.line.interval_at(math.log(x))
        return found and Interval(*map(math.exp, found))


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
    line = fit_line(np.log(x), np.log(y))
    return PowerLaw(math.exp(line.at(0.0)), line.slope, line)
