"""Many fits of a law at once: Huber loss on log residuals, in coordinates without constraints.

Letters: P problems (starts, resamples, points of a profile), R runs, F free coordinates, K
constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.runs import Runs

HUBER_WIDTH = 1e-3
# Where the search for each constant ends. A fit that arrives there has not found the constant.
_LIMITS = {
    "parameter_scale": (1e-20, 1e25),
    "token_scale": (1e-20, 1e25),
    "irreducible_loss": (1e-6, 1e3),
    "parameter_exponent": (1e-3, 10.0),
    "token_exponent": (1e-3, 10.0),
    "token_reuse": (1e-3, 1e6),
    "parameter_reuse": (1e-3, 1e6),
    "token_decay": (1e-6, 1 - 1e-6),
    "parameter_decay": (1e-6, 1 - 1e-6),
}
# A fit has ended after so many tries in a row that lower its objective by no more than the share.
_PATIENCE = 6
_SHARE = 1e-7


@dataclass(frozen=True)
class Coordinates:
    """The free constants of a form as numbers from minus to plus infinity.

    A constant is the exponential of its coordinate; one between 0 and 1 its logistic function.

    Attributes:
        form: The form.
        free: Constants that move, each with a coordinate.
        tie_exponents: Whether beta follows alpha; then beta is not free.
    """

    form: type[Law]
    free: tuple[str, ...]
    tie_exponents: bool = False

    def of(self, values: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Coordinates of constants.

        Args:
            values: float64 [..., n], constants called `names`.
            names: By default all of the form.

        Returns:
            float64 [..., n], within the limits of the search.
        """
        names = self.form.names() if names is None else names
        columns = [
            _coordinate(value.clamp(*_LIMITS[name]), name in self.form.fraction_names)
            for value, name in zip(values.unbind(-1), names, strict=True)
        ]
        return torch.stack(columns, dim=-1)

    def constants(self, free_F: Tensor, held_K: Tensor) -> Tensor:
        """Constants of laws.

        Args:
            free_F: float64 [..., F], coordinates.
            held_K: float64 [..., K], constants; those of free names are not looked at.

        Returns:
            float64 [..., K], differentiable in the coordinates.
        """
        held = dict(zip(self.form.names(), held_K.unbind(-1), strict=True))
        for name, column in zip(self.free, free_F.unbind(-1), strict=True):
            held[name] = column.sigmoid() if name in self.form.fraction_names else column.exp()
        if self.tie_exponents:
            held["token_exponent"] = held["parameter_exponent"]
        return torch.stack(torch.broadcast_tensors(*held.values()), dim=-1)

    def limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest coordinates, float64 [F] each."""
        if not self.free:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        low, high = (
            torch.tensor([_LIMITS[name][end] for name in self.free], dtype=torch.float64)
            for end in (0, 1)
        )
        return self.of(low, self.free), self.of(high, self.free)


def limit_reached(name: str, value: float) -> Literal[0, 1] | None:
    """Whether a constant lies where the search for it ends, so that it was not found.

    Args:
        name: The constant.
        value: Its value.

    Returns:
        0 at the lower limit, 1 at the upper, None between them.
    """
    low, high = _LIMITS[name]
    if value < 1.01 * low:
        return 0
    # The upper limit of a fraction is so near to 1 that its distance from 1 counts.
    return 1 if value > (1 - 1.01 * (1 - high) if high < 1 else 0.99 * high) else None


def huber_sums(residuals: Tensor, weights: Tensor) -> Tensor:
    """Sum over runs of Huber losses.

    Args:
        residuals: float64 [..., R], log predicted - log observed.
        weights: float64 [..., R], how often each run counts.

    Returns:
        float64 [...].
    """
    size = residuals.abs()
    quadratic = size.clamp(max=HUBER_WIDTH)
    return (weights * quadratic * (size - quadratic / 2)).sum(-1)


def sums_at(
    coordinates: Coordinates, free_PF: Tensor, held: Tensor, runs: Runs, weights: Tensor
) -> Tensor:
    """Objectives of many laws, without their gradients.

    Args:
        coordinates: What is free.
        free_PF: float64 [P, F].
        held: float64 [K] or [P, K].
        runs: What the laws are held against.
        weights: float64 [R] or [P, R].

    Returns:
        float64 [P].
    """
    constants_PK = coordinates.constants(free_PF, held)
    predicted = coordinates.form.log_loss(
        constants_PK[:, None], runs.num_parameters, runs.num_tokens, runs.unique_tokens
    )
    return huber_sums(predicted - runs.losses.log(), weights)


def descend(
    coordinates: Coordinates,
    start_PF: Tensor,
    held: Tensor,
    runs: Runs,
    weights: Tensor,
    max_steps: int = 300,
) -> tuple[Tensor, Tensor]:
    """Lowers the objectives of many problems at once, by damped Gauss-Newton steps.

    A step solves the least-squares problem in which a run with residual r beyond the Huber width
    weighs width / |r|; its value is never below the objective there, so the steps descend.

    Args:
        coordinates: What is free.
        start_PF: float64 [P, F], where to begin.
        held: float64 [K] or [P, K], the constants that are not free.
        runs: What is fitted.
        weights: float64 [R] or [P, R], how often each run counts.
        max_steps: At most so many steps.

    Returns:
        Coordinates [P, F] and objectives [P].

    Source:
        P. J. Huber, Robust Statistics (1981), section 7.8; K. Levenberg (1944).
    """
    free_PF = start_PF.clone()
    num_problems = len(free_PF)
    held_PK = held.expand(num_problems, -1)
    weights_PR = weights.expand(num_problems, -1)
    low_F, high_F = coordinates.limits()
    sums_P, slope_PF, bend_PFF = _expansion(coordinates, free_PF, held_PK, runs, weights_PR)
    damping_P = torch.full((num_problems,), 1e-3, dtype=torch.float64)
    idle_P = torch.zeros(num_problems)
    for _ in range(max_steps if coordinates.free else 0):
        (going,) = (idle_P < _PATIENCE).nonzero(as_tuple=True)
        if not len(going):
            break
        step = _damped_step(slope_PF[going], bend_PFF[going], damping_P[going])
        trial = torch.clamp(free_PF[going] - step, low_F, high_F)
        new_sums, new_slope, new_bend = _expansion(
            coordinates, trial, held_PK[going], runs, weights_PR[going]
        )
        gain = sums_P[going] - new_sums
        is_better = gain > 0  # False where the trial is not a number
        is_idle = ~(gain > _SHARE * sums_P[going])
        idle_P[going] = torch.where(is_idle, idle_P[going] + 1, 0.0)
        factor = torch.where(is_better, 1 / 3, 8.0).double()
        damping_P[going] = (damping_P[going] * factor).clamp(1e-6, 1e12)
        better = going[is_better]
        free_PF[better], sums_P[better] = trial[is_better], new_sums[is_better]
        slope_PF[better], bend_PFF[better] = new_slope[is_better], new_bend[is_better]
    return free_PF, sums_P.nan_to_num(math.inf)


def _coordinate(value: Tensor, is_fraction: bool) -> Tensor:
    return value.logit() if is_fraction else value.log()


def _expansion(
    coordinates: Coordinates, free_PF: Tensor, held_PK: Tensor, runs: Runs, weights_PR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Objectives [P], their gradients [P, F], and the Gauss-Newton curvatures [P, F, F]."""
    # A run has coordinates of its own here, so one backward pass gives all derivatives.
    own_PRF = free_PF[:, None].expand(-1, len(runs), -1).detach().clone().requires_grad_()
    predicted_PR = coordinates.form.log_loss(
        coordinates.constants(own_PRF, held_PK[:, None]),
        runs.num_parameters,
        runs.num_tokens,
        runs.unique_tokens,
    )
    residuals_PR = predicted_PR.detach() - runs.losses.log()
    if own_PRF.numel():
        (jacobian_PRF,) = torch.autograd.grad(predicted_PR.sum(), own_PRF)
    else:
        jacobian_PRF = torch.zeros_like(own_PRF)
    pull_PR = weights_PR * residuals_PR.clamp(-HUBER_WIDTH, HUBER_WIDTH)
    stiffness_PR = weights_PR * HUBER_WIDTH / residuals_PR.abs().clamp(min=HUBER_WIDTH)
    slope_PF = torch.einsum("prf,pr->pf", jacobian_PRF, pull_PR)
    bend_PFF = torch.einsum("prf,prg->pfg", jacobian_PRF * stiffness_PR[..., None], jacobian_PRF)
    return huber_sums(residuals_PR, weights_PR), slope_PF, bend_PFF


def _damped_step(slope_PF: Tensor, bend_PFF: Tensor, damping_P: Tensor) -> Tensor:
    """Solves (bend + damping * diagonal) step = slope; a problem without a solution stays."""
    diagonal_PF = bend_PFF.diagonal(dim1=1, dim2=2)
    # A constant without effect has no curvature of its own.
    floor_P1 = 1e-12 * diagonal_PF.amax(-1, keepdim=True) + 1e-200
    damped = bend_PFF + torch.diag_embed(damping_P[:, None] * diagonal_PF + floor_P1)
    step_PF, _ = torch.linalg.solve_ex(damped, slope_PF)
    return step_PF.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
