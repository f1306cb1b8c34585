"""Fits of scaling laws to finished runs: Huber loss on logarithms, many starts, L-BFGS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.descent import (
    Coordinates,
    descend,
    huber_sums,
    limit_reached,
    sums_at,
)
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.runs import Runs, check_identifiable

# Of all starts, so many of the best are descended from, and so many of the ends are polished.
_NUM_DESCENDED = 32
_NUM_POLISHED = 3
# Other minima that are kept: no worse than this multiple of the best, and apart by this share.
_OTHER_OBJECTIVE = 1.2
_APART = 0.05
_MAX_OTHERS = 4
# Starts of the default grid: exponents; E and A / N^alpha as shares of the loss; reuses as R.
_EXPONENTS = (0.1, 0.25, 0.45, 0.8)
_IRREDUCIBLE_SHARES = (0.15, 0.5, 0.8)
_PARAMETER_SHARES = (0.2, 0.5, 0.8)
_REUSES = (2.0, 12.0, 60.0)


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: The best that was found.
        objective: Sum of Huber losses of its log residuals.
        num_starts: How many starts were looked at.
        fitted: Constants that were fitted; the others were held.
        tie_exponents: Whether alpha = beta was asked for.
        others: Other minima nearly as low, best first.
    """

    law: Law
    objective: float
    num_starts: int
    fitted: tuple[str, ...]
    tie_exponents: bool = False
    others: tuple[Law, ...] = ()

    @property
    def at_limits(self) -> tuple[str, ...]:
        """Fitted constants that ran off to where the search ends: the runs do not tell them."""
        return tuple(
            name for name in self.fitted if limit_reached(name, getattr(self.law, name)) is not None
        )

    @property
    def coordinates(self) -> Coordinates:
        """The fitted constants as free coordinates."""
        return coordinates_of(type(self.law), self.fitted, self.tie_exponents)


def objective(law: Law, runs: Runs) -> float:
    """Sum over runs of Huber(log predicted - log observed), width 1e-3.

    Args:
        law: Any law.
        runs: What it is held against.

    Returns:
        The objective of arXiv 2203.15556, section 3.3; 0 for a perfect law.
    """
    return float(huber_sums(residuals(law, runs), torch.ones(len(runs), dtype=torch.float64)))


def residuals(law: Law, runs: Runs) -> Tensor:
    """Log predicted minus log observed loss, float64 [R]."""
    predicted = law.loss(
        num_parameters=runs.num_parameters,
        num_tokens=runs.num_tokens,
        unique_tokens=runs.unique_tokens,
    )
    return predicted.log() - runs.losses.log()


def r_squared(law: Law, runs: Runs) -> float:
    """Share of the variance of log losses that a law explains; below 0: less than a constant."""
    logs = runs.losses.log()
    return float(1 - residuals(law, runs).square().sum() / (logs - logs.mean()).square().sum())


def fit_law(
    runs: Runs,
    form: type[Law],
    *,
    held: Mapping[str, float] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    tie_exponents: bool = False,
) -> Fit:
    """Fits the constants of a form that are not held.

    All starts are evaluated; the best are descended from together, and the lowest ends polished by
    L-BFGS.

    Args:
        runs: Finished runs.
        form: The form.
        held: Constants that keep these values.
        starts: For constants, where to begin instead of at the default grid's values.
        tie_exponents: Fit alpha = beta.

    Returns:
        The lowest minimum that was found, and others near it.

    Raises:
        DataError: The runs are too few or vary too little, or no start has a finite objective.
    """
    held = dict(held or {})
    _check_constants(form, held, starts or {}, tie_exponents)
    fitted = tuple(name for name in form.names() if name not in held)
    if not fitted:
        raise DataError("No constant is left to fit: hold fewer.")
    check_identifiable(runs, form, fitted, tie_exponents)
    coordinates = coordinates_of(form, fitted, tie_exponents)
    start_PK = _starts(runs, form, held, starts or {})
    weights = torch.ones(len(runs), dtype=torch.float64)
    held_K = start_PK[0]  # constants that are not fitted are the same in every start
    free_PF = _free_of(coordinates, start_PK)
    sums_P = torch.cat(
        [sums_at(coordinates, some, held_K, runs, weights) for some in free_PF.split(512)]
    ).nan_to_num(math.inf)
    best = sums_P.argsort()[:_NUM_DESCENDED]
    ends_PF, sums_P = descend(coordinates, free_PF[best], held_K, runs, weights)
    order = sums_P.argsort()
    ends_PF, sums_P = _polished(coordinates, ends_PF[order], sums_P[order], held_K, runs)
    if not math.isfinite(float(sums_P[0])):
        raise DataError(
            f"None of {len(start_PK)} starts ends in a finite objective: hold constants near what "
            "you expect."
        )
    laws = [form.from_values(row) for row in coordinates.constants(ends_PF, held_K).tolist()]
    others = _others(ends_PF, sums_P, laws)
    return Fit(laws[0], float(sums_P[0]), len(start_PK), fitted, tie_exponents, others)


def coordinates_of(form: type[Law], fitted: Sequence[str], tie_exponents: bool) -> Coordinates:
    """Free coordinates of fitted constants; a tied beta has none of its own."""
    free = (name for name in fitted if not (tie_exponents and name == "token_exponent"))
    return Coordinates(form, tuple(free), tie_exponents)


def starts_near(fit: Fit) -> Tensor:
    """Where refits of nearly the same runs begin: the fit, its other minima, other reuses.

    Args:
        fit: Of the runs.

    Returns:
        float64 [P, F], coordinates; the fit itself comes first.
    """
    coordinates = fit.coordinates
    laws = torch.tensor([law.values() for law in (fit.law, *fit.others)], dtype=torch.float64)
    free_PF = _free_of(coordinates, laws)
    moved = [free_PF]
    for index, name in enumerate(coordinates.free):
        if name in coordinates.form.reuse_names:
            for shift in (-1.5, 1.5):
                one = free_PF[:1].clone()
                one[0, index] += shift
                moved.append(one)
    low_F, high_F = coordinates.limits()
    return torch.clamp(torch.cat(moved), low_F, high_F)


def _check_constants(
    form: type[Law],
    held: Mapping[str, float],
    starts: Mapping[str, Sequence[float]],
    tie_exponents: bool,
) -> None:
    """Refuses constants that the form does not have, or that cannot be held."""
    unknown = (set(held) | set(starts)) - set(form.names())
    if unknown:
        raise DataError(
            f"{min(unknown)} is no constant of the form {form.form}: use {', '.join(form.names())}."
        )
    wrong = [name for name, value in held.items() if not value > 0 and name in form.names()[:5]]
    if wrong:
        raise DataError(f"{wrong[0]}={held[wrong[0]]} is not valid: give a number above 0.")
    if tie_exponents and {"parameter_exponent", "token_exponent"} & set(held):
        raise DataError("A tied exponent cannot be held: hold both, or tie them without holding.")


def _free_of(coordinates: Coordinates, constants_PK: Tensor) -> Tensor:
    names = coordinates.form.names()
    columns = [names.index(name) for name in coordinates.free]
    return coordinates.of(constants_PK[:, columns], coordinates.free)


def _starts(
    runs: Runs, form: type[Law], held: Mapping[str, float], given: Mapping[str, Sequence[float]]
) -> Tensor:
    """Every combination of starts, float64 [P, K]; scales follow from shares of the losses."""
    log_n, log_d = runs.num_parameters.log().median(), runs.num_tokens.log().median()
    typical, lowest = float(runs.losses.median()), float(runs.losses.min())
    fixed = {name: (value,) for name, value in held.items()} | {
        name: tuple(values) for name, values in given.items() if name not in held
    }
    irreducible = fixed.get(
        "irreducible_loss", tuple(share * lowest for share in _IRREDUCIBLE_SHARES)
    )
    alphas = fixed.get("parameter_exponent", _EXPONENTS)
    betas = fixed.get("token_exponent", _EXPONENTS)
    default_reuses = {
        name: tuple(1 / (1 + value) if name in form.fraction_names else value for value in _REUSES)
        for name in form.reuse_names
    }
    reuses = [fixed.get(name, default_reuses[name]) for name in form.reuse_names]
    rows: set[tuple[float, ...]] = set()
    for e, alpha, beta, share, *reuse in itertools.product(
        irreducible, alphas, betas, _PARAMETER_SHARES, *reuses
    ):
        reducible = max(typical - e, 0.1 * typical)
        scales = (
            (share * reducible * math.exp(alpha * log_n),),
            ((1 - share) * reducible * math.exp(beta * log_d),),
        )
        rows.update(
            (a, b, e, alpha, beta, *reuse)
            for a in fixed.get("parameter_scale", scales[0])
            for b in fixed.get("token_scale", scales[1])
        )
    return torch.tensor(sorted(rows), dtype=torch.float64)


def _polished(
    coordinates: Coordinates, ends_PF: Tensor, sums_P: Tensor, held_K: Tensor, runs: Runs
) -> tuple[Tensor, Tensor]:
    """Lowers the first ends by L-BFGS and sorts all by their objectives."""
    ends_PF, sums_P = ends_PF.clone(), sums_P.clone()
    weights = torch.ones(len(runs), dtype=torch.float64)

    def value_and_gradient(free: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        free_1F = torch.tensor(free[None], requires_grad=True)
        value = sums_at(coordinates, free_1F, held_K, runs, weights).sum()
        (gradient,) = torch.autograd.grad(value, free_1F)
        return float(value.detach()), gradient[0].numpy()

    limits = list(zip(*(limit.tolist() for limit in coordinates.limits()), strict=True))
    for index in range(min(_NUM_POLISHED, len(ends_PF))):
        if not math.isfinite(float(sums_P[index])):
            continue
        found = minimize(
            value_and_gradient,
            ends_PF[index].numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=limits,
            options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10},
        )
        if found.fun <= float(sums_P[index]):
            ends_PF[index], sums_P[index] = torch.from_numpy(found.x), float(found.fun)
    order = sums_P.argsort()
    return ends_PF[order], sums_P[order]


def _others(ends_PF: Tensor, sums_P: Tensor, laws: Sequence[Law]) -> tuple[Law, ...]:
    """Minima besides the first that lie apart from it and from each other."""
    kept = [0]
    for index in range(1, len(laws)):
        is_low = float(sums_P[index]) < _OTHER_OBJECTIVE * float(sums_P[0])
        gaps = [float((ends_PF[index] - ends_PF[one]).abs().max()) for one in kept]
        if is_low and min(gaps) > _APART and len(kept) <= _MAX_OTHERS:
            kept.append(index)
    return tuple(laws[index] for index in kept[1:])
