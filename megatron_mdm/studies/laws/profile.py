"""Profiles: how high the objective rises when one constant is held elsewhere.

Letters as in `descent`; G points of a profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, student_reach
from megatron_mdm.studies.laws.descent import HUBER_WIDTH, Coordinates, descend
from megatron_mdm.studies.laws.fitting import Fit, residuals, starts_near
from megatron_mdm.studies.laws.runs import Runs
from megatron_mdm.studies.laws.uncertainty import descend_from_best

# The density of residuals at 0 is read off the smallest of them, this share.
_CENTRAL_SHARE = 0.3
# A profile is first looked at so far up and down from the estimate (in its coordinate), and then
# closer, until so many of its points lie inside the interval.
_FARTHEST = math.log(1000.0)
_POINTS = 41
_INSIDE = 10
_CLOSER_LOOKS = 5
# An interval whose ends are further apart than this factor says little.
_WEAK_RATIO = 10.0


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
    sizes = residuals(fit.law, runs).abs().sort().values
    degrees = len(runs) - num_free
    spread = float(sizes.clamp(max=HUBER_WIDTH).square().sum()) / degrees
    counted = sizes[num_free:]
    central = counted[: max(1, math.ceil(_CENTRAL_SHARE * len(counted)))]
    reach = max(float(central[-1]), HUBER_WIDTH)
    density = float((counted <= reach).double().mean()) / reach
    return 2 * density * HUBER_WIDTH / max(spread, 1e-30)


def profile(
    runs: Runs,
    fit: Fit,
    name: str,
    reach: Interval | None = None,
    num_points: int = _POINTS,
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
    degrees = len(runs) - len(fit.coordinates.free)
    rise = student_reach(1.0, degrees) ** 2 / likelihood_ratio_factor(fit, runs)
    solver = _Profiler(runs, fit, name)
    low, high = solver.limits if reach is None else map(solver.coordinate, reach)
    grid = torch.linspace(low, high, num_points, dtype=torch.float64)
    sums = solver.lowest(grid)
    for _ in range(_CLOSER_LOOKS):
        bound = min(float(sums.min()), fit.objective) + rise
        inside = (sums <= bound).nonzero().flatten()
        if len(inside) >= _INSIDE or reach is not None:
            break
        # One point further than the interval on either side.
        first = int(inside[0]) if len(inside) else int(sums.argmin())
        last = int(inside[-1]) if len(inside) else first
        low, high = float(grid[max(first - 1, 0)]), float(grid[min(last + 1, num_points - 1)])
        grid = torch.linspace(low, high, num_points, dtype=torch.float64)
        sums = solver.lowest(grid)
    lowest = min(float(sums.min()), fit.objective)
    values = tuple(solver.value(point) for point in grid.tolist())
    interval = _inside(grid.tolist(), sums.tolist(), lowest + rise, solver)
    return Profile(
        name,
        getattr(fit.law, name),
        values,
        tuple(sums.tolist()),
        lowest,
        lowest + rise,
        interval,
    )


class _Profiler:
    """Refits all constants but one, for many values of it at once."""

    def __init__(self, runs: Runs, fit: Fit, name: str) -> None:
        self._runs = runs
        self._fit = fit
        self._form = type(fit.law)
        tied = ("parameter_exponent", "token_exponent")
        self._is_tied = fit.tie_exponents and name in tied
        self._names = tied if self._is_tied else (name,)
        self._one = Coordinates(self._form, self._names[:1])
        free = fit.coordinates.free
        kept = tuple(one for one in free if one not in self._names)
        self._rest = Coordinates(self._form, kept, fit.tie_exponents and not self._is_tied)
        self._start_SF = starts_near(fit)[:, [free.index(one) for one in kept]]
        estimate = self.coordinate(getattr(fit.law, name))
        low, high = (float(limit) for limit in self._one.limits())
        self.limits = (max(estimate - _FARTHEST, low), min(estimate + _FARTHEST, high))

    def coordinate(self, value: float) -> float:
        """The coordinate of a value of the constant."""
        return float(self._one.of(torch.tensor([value], dtype=torch.float64), self._one.free))

    def value(self, coordinate: float) -> float:
        """The value of a coordinate."""
        held = torch.tensor(self._fit.law.values(), dtype=torch.float64)
        constants = self._one.constants(torch.tensor([coordinate], dtype=torch.float64), held)
        return float(constants[self._form.names().index(self._names[0])])

    def lowest(self, grid_G: Tensor) -> Tensor:
        """The lowest objective at each coordinate, float64 [G]."""
        held = torch.tensor(self._fit.law.values(), dtype=torch.float64)
        held_GK = self._one.constants(grid_G[:, None], held)
        if self._is_tied:
            names = self._form.names()
            held_GK[:, names.index("token_exponent")] = held_GK[:, names.index(self._names[0])]
        weights_GR = torch.ones(len(grid_G), len(self._runs), dtype=torch.float64)
        best_GF, sums_G = descend_from_best(
            self._rest, self._start_SF, held_GK, self._runs, weights_GR
        )
        # What fits well at one value is the best start at its neighbours.
        neighbours = torch.cat([best_GF.roll(1, 0), best_GF.roll(-1, 0)])
        _, sums = descend(
            self._rest, neighbours, held_GK.repeat(2, 1), self._runs, weights_GR.repeat(2, 1)
        )
        return torch.cat([sums_G[None], sums.view(2, -1)]).min(0).values


def _inside(
    grid: Sequence[float], sums: Sequence[float], threshold: float, solver: _Profiler
) -> Interval:
    """The outermost values whose objective is below a threshold, between points by lines."""
    inside = [index for index, value in enumerate(sums) if value <= threshold]
    if not inside:
        return Interval(0.0, math.inf)

    def crossing(index: int, outside: int) -> float:
        share = (threshold - sums[index]) / (sums[outside] - sums[index])
        return solver.value(grid[index] + share * (grid[outside] - grid[index]))

    first, last = inside[0], inside[-1]
    low = crossing(first, first - 1) if first > 0 else 0.0
    high = crossing(last, last + 1) if last < len(grid) - 1 else math.inf
    return Interval(low, high)
