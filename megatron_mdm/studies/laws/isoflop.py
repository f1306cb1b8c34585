"""IsoFLOP analysis: the best size at each budget, from a parabola through runs of equal compute.

Letters: n runs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, student_reach
from megatron_mdm.studies.laws.power_law import PowerLaw, fit_power_law
from megatron_mdm.studies.laws.runs import Runs, num_distinct

# Runs are of one budget if their 6 N D lie within this share above the least of them.
SAME_BUDGET = 0.02


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
        loss_interval: Of `best_loss`, likewise.
    """

    flops: float
    num_parameters: NDArray[np.float64]
    losses: NDArray[np.float64]
    best_parameters: float
    best_loss: float
    curvature: float
    parameters_interval: Interval | None
    loss_interval: Interval | None

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


class _Parabola(NamedTuple):
    center: float
    coefficients: NDArray[np.float64]
    inverse: NDArray[Any]
    squares: float
    degrees: int


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
    flops = runs.flops[order].numpy()
    starts = [0]
    for index, value in enumerate(flops):
        if value > flops[starts[-1]] * (1 + SAME_BUDGET):
            starts.append(index)
    members = [order[first:last] for first, last in _pairs(starts, len(flops))]
    parabolas = []
    for rows in members:
        budget = math.exp(float(runs.flops[rows].log().mean()))
        sizes = num_distinct(runs.num_parameters[rows])
        if sizes < 3:
            raise DataError(
                f"At {budget:.3g} FLOPs there are runs of {sizes} different sizes, too few for a "
                "parabola: train at least 3 sizes, better 5, or leave these runs out."
            )
        parabola = _parabola(
            runs.num_parameters[rows].log().numpy(), runs.losses[rows].numpy(), budget
        )
        parabolas.append(parabola)
    degrees = sum(one.degrees for one in parabolas)
    noise = sum(one.squares for one in parabolas) / degrees if degrees else None
    groups = tuple(
        _group(runs, rows.numpy(), parabola, noise, degrees)
        for rows, parabola in zip(members, parabolas, strict=True)
    )
    if len(groups) < 2:
        return IsoFlopAnalysis(groups, None, None, None)
    budgets = [group.flops for group in groups]
    return IsoFlopAnalysis(
        groups,
        fit_power_law(budgets, [group.best_parameters for group in groups]),
        fit_power_law(budgets, [group.best_tokens for group in groups]),
        fit_power_law(budgets, [group.best_loss for group in groups]),
    )


def _pairs(starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    return list(zip(starts, [*starts[1:], end], strict=True))


def _parabola(log_n: NDArray[np.float64], losses: NDArray[np.float64], budget: float) -> _Parabola:
    """Least squares of losses in 1, z and z^2, with z = log N - center."""
    center = float(log_n.mean())
    z = log_n - center
    design = np.stack([np.ones_like(z), z, z * z], axis=1)
    inverse: NDArray[Any] = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ losses
    if not coefficients[2] > 0:
        raise DataError(
            f"At {budget:.3g} FLOPs the losses have no minimum over the sizes (the parabola opens "
            "downward): check these runs, or add smaller and larger sizes."
        )
    rest = losses - design @ coefficients
    return _Parabola(center, coefficients, inverse, float(rest @ rest), len(losses) - 3)


def _group(
    runs: Runs,
    rows: NDArray[np.int64],
    parabola: _Parabola,
    noise: float | None,
    degrees: int,
) -> IsoFlop:
    """The minimum of a parabola, with the delta method's intervals."""
    level, slope, curvature = parabola.coefficients
    best = -slope / (2 * curvature)
    lowest = level - slope**2 / (4 * curvature)
    of_best = np.array([0, -1 / (2 * curvature), slope / (2 * curvature**2)])
    of_lowest = np.array([1, best, best**2])
    intervals: list[Interval | None] = [None, None]
    if noise is not None:
        reach, loss_reach = (
            student_reach(math.sqrt(noise * float(gradient @ parabola.inverse @ gradient)), degrees)
            for gradient in (of_best, of_lowest)
        )
        log_best = parabola.center + best
        intervals = [
            Interval(math.exp(log_best - reach), math.exp(log_best + reach)),
            Interval(lowest - loss_reach, lowest + loss_reach),
        ]
    return IsoFlop(
        flops=math.exp(float(runs.flops[rows].log().mean())),
        num_parameters=runs.num_parameters[rows].numpy(),
        losses=runs.losses[rows].numpy(),
        best_parameters=math.exp(parabola.center + best),
        best_loss=float(lowest),
        curvature=float(curvature),
        parameters_interval=intervals[0],
        loss_interval=intervals[1],
    )
