"""IsoFLOP analysis: the best size at each budget, from a parabola through runs of equal compute.

Letters: n runs of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, student_reach
from megatron_mdm.studies.laws.forms import Array
from megatron_mdm.studies.laws.power_law import PowerLaw, fit_power_law
from megatron_mdm.studies.laws.runs import Runs, num_distinct

# Runs are of one budget if their 6 N D lie within this share above the least of them.
_SAME_BUDGET = 0.02


@dataclass(frozen=True)
class IsoFlop:
    """Runs of one budget and the parabola L = lowest + curvature * (log N - log best)^2.

    Attributes:
        flops: 6 N D, geometric mean of the group.
        num_parameters: float64 [n], N.
        losses: float64 [n], nats per token.
        best_parameters: Where the parabola is lowest.
        best_loss: Its value there, nats per token.
        curvature: Above 0.
        parameters_interval: Of `best_parameters`, by the delta method; None where no group has
            more than three runs.
    """

    flops: float
    num_parameters: Array
    losses: Array
    best_parameters: float
    best_loss: float
    curvature: float
    parameters_interval: Interval | None = None

    @property
    def best_tokens(self) -> float:
        """D at the best size."""
        return self.flops / (6 * self.best_parameters)

    @property
    def extrapolates(self) -> bool:
        """Whether the minimum lies outside the sizes of the runs."""
        inside = self.num_parameters.min() <= self.best_parameters <= self.num_parameters.max()
        return not inside


@dataclass(frozen=True)
class IsoFlopAnalysis:
    """Best sizes, and how they grow with compute C in FLOPs.

    Attributes:
        groups: One a budget, ascending.
        size_law: N(C); None of a single budget. So are the others.
        token_law: D(C).
        loss_law: L(C), a power law without an irreducible loss: for interpolation.
    """

    groups: tuple[IsoFlop, ...]
    size_law: PowerLaw | None
    token_law: PowerLaw | None
    loss_law: PowerLaw | None

    def warnings(self) -> list[str]:
        """A sentence for each budget whose minimum is extrapolated."""
        return [
            f"At {group.flops:.3g} FLOPs the best size, {group.best_parameters:.3g} parameters, "
            f"lies outside the runs ({group.num_parameters.min():.3g} to "
            f"{group.num_parameters.max():.3g}): add sizes on that side."
            for group in self.groups
            if group.extrapolates
        ]


def analyze_isoflops(runs: Runs) -> IsoFlopAnalysis:
    """Finds the best size at each budget.

    The noise of a loss is taken to be the same everywhere: its variance is pooled over all groups.
    Repetition is not looked at: give runs on the same unique tokens, or on fresh ones.

    Args:
        runs: Several sizes at each of one or more budgets.

    Returns:
        The analysis.

    Raises:
        DataError: A budget has fewer than three sizes, or its losses have no minimum.

    Source:
        arXiv 2203.15556, section 3.2.
    """
    order = runs.flops.argsort()
    flops = runs.flops[order]
    starts = [0]
    for index, value in enumerate(flops):
        if value > flops[starts[-1]] * (1 + _SAME_BUDGET):
            starts.append(index)
    fits = [_fit_parabola(runs.take(rows)) for rows in np.split(order, starts[1:])]
    degrees = len(runs) - 3 * len(fits)
    noise = sum(squares for _, squares, _ in fits) / degrees if degrees else None
    groups = tuple(_with_interval(group, noise, ratio, degrees) for group, _, ratio in fits)
    if len(groups) < 2:
        return IsoFlopAnalysis(groups, None, None, None)
    budgets = [group.flops for group in groups]
    return IsoFlopAnalysis(
        groups,
        fit_power_law(budgets, [group.best_parameters for group in groups]),
        fit_power_law(budgets, [group.best_tokens for group in groups]),
        fit_power_law(budgets, [group.best_loss for group in groups]),
    )


def _fit_parabola(runs: Runs) -> tuple[IsoFlop, float, float]:
    """Runs of one budget and their parabola by least squares.

    Returns:
        The group without its interval, the sum of squared residuals, and by the delta method the
        variance of log `best_parameters` over that of a loss.
    """
    flops = math.exp(float(np.log(runs.flops).mean()))
    sizes = num_distinct(runs.num_parameters)
    if sizes < 3:
        raise DataError(
            f"At {flops:.3g} FLOPs there are runs of {sizes} different sizes, too few for a "
            "parabola: train at least 3 sizes, better 5, or leave these runs out."
        )
    logs = np.log(runs.num_parameters)
    z = logs - logs.mean()
    coefficients, covariance = np.polyfit(z, runs.losses, 2, cov="unscaled")
    curvature, slope, level = coefficients.tolist()
    if not curvature > 0:
        raise DataError(
            f"At {flops:.3g} FLOPs the losses have no minimum over the sizes (the parabola opens "
            "downward): check these runs, or add smaller and larger sizes."
        )
    group = IsoFlop(
        flops=flops,
        num_parameters=runs.num_parameters,
        losses=runs.losses,
        best_parameters=math.exp(float(logs.mean()) - slope / (2 * curvature)),
        best_loss=level - slope**2 / (4 * curvature),
        curvature=curvature,
    )
    rest = runs.losses - np.polyval(coefficients, z)
    slopes_of_best = np.array([slope / (2 * curvature**2), -1 / (2 * curvature), 0])
    return group, float(rest @ rest), float(slopes_of_best @ covariance @ slopes_of_best)


def _with_interval(group: IsoFlop, noise: float | None, ratio: float, degrees: int) -> IsoFlop:
    if noise is None:
        return group
    factor = math.exp(student_reach(math.sqrt(noise * ratio), degrees))
    ends = Interval(group.best_parameters / factor, group.best_parameters * factor)
    return replace(group, parameters_interval=ends)
