"""How the gap between the best MDM and the best AR model moves, and where it would close."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, student_reach
from megatron_mdm.studies.papers.crossover import Comparison

Variable = Literal["unique_tokens", "num_parameters"]


@dataclass(frozen=True)
class GapTrend:
    """A line through gaps: gap = level + slope (ln x - center).

    Attributes:
        variable: What x is.
        fixed: What was the same, in words.
        points: x and gap of every comparison.
        center: Mean of ln x.
        level: Gap at the center, nats per token.
        slope: Nats per token for each e-fold of x.
        level_error: Standard error of the level; None of two points.
        slope_error: Standard error of the slope; None of two points.
    """

    variable: Variable
    fixed: str
    points: tuple[tuple[float, float], ...]
    center: float
    level: float
    slope: float
    level_error: float | None
    slope_error: float | None

    def at(self, x: float) -> float:
        """The line's gap at x."""
        return self.level + self.slope * (math.log(x) - self.center)

    @property
    def slope_interval(self) -> Interval | None:
        """Where the slope lies, by Student's t; None of two points."""
        if self.slope_error is None:
            return None
        reach = student_reach(self.slope_error, len(self.points) - 2)
        return Interval(self.slope - reach, self.slope + reach)

    @property
    def meeting(self) -> float | None:
        """X where the line is zero; None where its logarithm is beyond a hundred e-folds."""
        if self.slope == 0 or abs(distance := self.level / self.slope) > 100:
            return None
        return math.exp(self.center - distance)

    @property
    def meeting_interval(self) -> Interval | None:
        """Fieller's interval of the meeting point; None where it has no two finite ends.

        It holds those z = ln x - center for which (level + slope z)^2 is at most
        t^2 (level_error^2 + slope_error^2 z^2). Unless the slope differs from zero, these are all
        numbers, or all beyond two ends: the data do not say where the lines meet.

        Source:
            Fieller 1954, "Some problems in interval estimation".
        """
        if self.level_error is None or self.slope_error is None:
            return None
        slope_reach, level_reach = (
            student_reach(error, len(self.points) - 2)
            for error in (self.slope_error, self.level_error)
        )
        a = self.slope**2 - slope_reach**2
        b = 2 * self.level * self.slope
        c = self.level**2 - level_reach**2
        if a <= 0:
            return None
        middle, reach = -b / (2 * a), math.sqrt(max(b * b - 4 * a * c, 0.0)) / (2 * a)
        ends = (self.center + middle - reach, self.center + middle + reach)
        if max(map(abs, ends)) > 700:
            return None
        return Interval(math.exp(ends[0]), math.exp(ends[1]))


def gap_trends(comparisons: Sequence[Comparison]) -> list[GapTrend]:
    """Lines through the gaps that differ in one thing alone, wherever there are two or more.

    Args:
        comparisons: Any.

    Returns:
        Trends in unique tokens, then in parameters; those of most points first.
    """
    data: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, list[tuple[float, float]]] = {}
    for one in comparisons:
        corpus, tokens, parameters = one.condition
        data.setdefault(f"{corpus}, {one.condition.size}", []).append((tokens, one.gap))
        if parameters is not None:
            fixed = f"{corpus}, {tokens:,} unique tokens"
            sizes.setdefault(fixed, []).append((parameters, one.gap))
    trends: list[GapTrend] = []
    groups: tuple[tuple[Variable, dict[str, list[tuple[float, float]]]], ...] = (
        ("unique_tokens", data),
        ("num_parameters", sizes),
    )
    for variable, found in groups:
        lines = [
            fit_gap_trend(variable, fixed, points)
            for fixed, points in found.items()
            if len({x for x, _ in points}) > 1
        ]
        trends += sorted(lines, key=lambda line: -len(line.points))
    return trends


def fit_gap_trend(
    variable: Variable, fixed: str, points: Sequence[tuple[float, float]]
) -> GapTrend:
    """Least squares through gaps.

    Args:
        variable: What x is.
        fixed: What was the same, in words.
        points: x, above 0, and the gap in nats per token; two or more x.

    Returns:
        The line, with standard errors of three points or more.

    Raises:
        DataError: There are no two different x.
    """
    if len({x for x, _ in points}) < 2:
        raise DataError(f"A trend in {variable} needs two different values: run another one.")
    points = sorted(points)
    logs, gaps = np.log([x for x, _ in points]), np.array([gap for _, gap in points])
    center, level = float(logs.mean()), float(gaps.mean())
    spread = float(np.square(logs - center).sum())
    slope = float((logs - center) @ gaps / spread)
    level_error = slope_error = None
    if len(points) > 2:
        rest = gaps - level - slope * (logs - center)
        noise = math.sqrt(float(rest @ rest) / (len(points) - 2))
        level_error, slope_error = noise / math.sqrt(len(points)), noise / math.sqrt(spread)
    return GapTrend(variable, fixed, tuple(points), center, level, slope, level_error, slope_error)
