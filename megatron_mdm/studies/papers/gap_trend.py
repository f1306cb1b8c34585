"""How the gap between the best MDM and the best AR model moves, and where it would close."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, Line, fit_line, student_reach
from megatron_mdm.studies.papers.crossover import Comparison

Variable = Literal["unique_tokens", "num_parameters"]


@dataclass(frozen=True)
class GapTrend:
    """A line through gaps, against ln x.

    Attributes:
        variable: What x is.
        fixed: What was the same, in words.
        points: x and gap of every comparison.
        line: Gap in nats per token, its slope for each e-fold of x.
    """

    variable: Variable
    fixed: str
    points: tuple[tuple[float, float], ...]
    line: Line

    def at(self, x: float) -> float:
        """The line's gap at x."""
        return self.line.at(math.log(x))

    @property
    def meeting(self) -> float | None:
        """X where the line is zero; None where its logarithm is beyond a hundred e-folds."""
        line = self.line
        if line.slope == 0 or abs(distance := line.level / line.slope) > 100:
            return None
        return math.exp(line.center - distance)

    @property
    def meeting_interval(self) -> Interval | None:
        """Fieller's interval of the meeting point; None where it has no two finite ends.

        It holds those z = ln x - center for which (level + slope z)^2 is at most
        t^2 (level_error^2 + slope_error^2 z^2). Unless the slope differs from zero, these are all
        numbers, or all beyond two ends: the data do not say where the lines meet.

        Source:
            Fieller 1954, "Some problems in interval estimation".
        """
        line = self.line
        if line.level_error is None or line.slope_error is None:
            return None
        slope_reach, level_reach = (
            student_reach(error, line.degrees) for error in (line.slope_error, line.level_error)
        )
        a = line.slope**2 - slope_reach**2
        b = 2 * line.level * line.slope
        c = line.level**2 - level_reach**2
        if a <= 0:
            return None
        middle, reach = -b / (2 * a), math.sqrt(max(b * b - 4 * a * c, 0.0)) / (2 * a)
        ends = (line.center + middle - reach, line.center + middle + reach)
        if max(map(abs, ends)) > 700:
            return None
        return Interval(math.exp(ends[0]), math.exp(ends[1]))


def fit_gap_trends(comparisons: Sequence[Comparison]) -> list[GapTrend]:
    """Lines through the gaps that differ in one thing alone, wherever there are two or more.

    Args:
        comparisons: Any.

    Returns:
        Trends in unique tokens, then in parameters; those of most points first.
    """
    groups: dict[tuple[Variable, str], list[tuple[float, float]]] = {}
    for one in comparisons:
        corpus, tokens, parameters = one.condition
        fixed = f"{corpus}, {one.condition.size}"
        groups.setdefault(("unique_tokens", fixed), []).append((tokens, one.gap))
        if parameters is not None:
            fixed = f"{corpus}, {tokens:,} unique tokens"
            groups.setdefault(("num_parameters", fixed), []).append((parameters, one.gap))
    trends = [
        fit_gap_trend(variable, fixed, points)
        for (variable, fixed), points in groups.items()
        if len({x for x, _ in points}) > 1
    ]
    return sorted(trends, key=lambda one: (one.variable != "unique_tokens", -len(one.points)))


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
    line = fit_line([math.log(x) for x, _ in points], [gap for _, gap in points])
    return GapTrend(variable, fixed, tuple(points), line)
