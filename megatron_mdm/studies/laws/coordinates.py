"""The constants of a law that a fit moves, and what it lowers: Huber losses of log residuals.

Letters: P laws, R runs, F free coordinates, K constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from megatron_mdm.studies.laws.forms import Array, Law
from megatron_mdm.studies.laws.overfitting import Minimum, PenalizedLaw
from megatron_mdm.studies.laws.runs import Runs

HUBER_WIDTH = 1e-3
PENALTY = "overfitting_scale"
_STEP = 1e-7
# Of the search by L-BFGS: it ends when a step lowers the objective by less than this share.
_TOLERANCE = 1e-9
# Coordinates this near to an end of the search are at it.
_AT_END = 0.01


@dataclass(frozen=True)
class Coordinates:
    """The free constants of a form as numbers without units, in which fits are well scaled.

    A constant is the exponential of its coordinate; one between 0 and 1 its logistic function. A
    scale is told by the size of its term in the middle of the runs, A / N^alpha, which depends
    little on the exponent.

    Attributes:
        form: The form.
        fitted: Constants that are fitted, in the order of the form.
        held: The others' values.
        tie_exponents: Whether beta follows alpha; then beta has no coordinate.
        log_middles: Of the scales, in the middle of the runs, see `Law.log_middles`.
        minimum: Where the loss has its minimum in epochs; the scale of the penalty, which is not
            fitted then, follows from it. None: nowhere in particular.
    """

    form: type[Law]
    fitted: tuple[str, ...]
    held: Mapping[str, float]
    tie_exponents: bool
    log_middles: Mapping[str, Mapping[str, float]]
    minimum: Minimum | None = None

    @property
    def free(self) -> tuple[str, ...]:
        """Constants that have a coordinate."""
        tied = "token_exponent" if self.tie_exponents else None
        return tuple(name for name in self.fitted if name != tied)

    def hold(self, values: Mapping[str, float]) -> Coordinates:
        """The same with more constants held."""
        fitted = tuple(name for name in self.fitted if name not in values)
        ties = self.tie_exponents and "token_exponent" not in values
        return replace(self, fitted=fitted, held={**self.held, **values}, tie_exponents=ties)

    def put_minimum(self, minimum: Minimum) -> Coordinates:
        """The same with the minimum in epochs held in its place."""
        return replace(self.hold({PENALTY: 1.0}), minimum=minimum)

    def constants(self, free_PF: Array) -> Array:
        """Constants of laws, float64 [..., K], of coordinates [..., F]."""
        about = self.form.constants()
        columns = {name: np.asarray(value) for name, value in self.held.items()}
        for name, column in zip(self.free, np.moveaxis(free_PF, -1, 0), strict=True):
            columns[name] = about[name].value(column)
        if self.tie_exponents:
            columns["token_exponent"] = columns["parameter_exponent"]
        for scale, middles in self.log_middles.items():
            if scale in self.fitted:
                shifts = (columns[exponent] * middle for exponent, middle in middles.items())
                columns[scale] = columns[scale] * np.exp(sum(shifts))
        if self.minimum is not None and issubclass(self.form, PenalizedLaw):
            columns[PENALTY] = np.exp(self.form.log_scale_at(columns, self.minimum))
        constants_PK = np.empty((*free_PF.shape[:-1], len(about)))
        for index, name in enumerate(about):
            constants_PK[..., index] = columns[name]
        return constants_PK

    def of(self, law: Law) -> Array:
        """Coordinates of a law, float64 [F], within the ends of the search."""
        return np.clip([self._place(law, name) for name in self.free], *self.ends())

    def ends(self) -> tuple[Array, Array]:
        """Lowest and highest coordinates of the search, float64 [F] each."""
        about = [self.form.constants()[name] for name in self.free]
        low = np.array([one.coordinate(one.low) for one in about], dtype=np.float64)
        return low, np.array([one.coordinate(one.high) for one in about], dtype=np.float64)

    def bounded(self, law: Law, name: str) -> float:
        """A fitted constant's value; 0 or infinity where its search ended before it was found."""
        about, place = self.form.constants()[name], self._place(law, name)
        if place < about.coordinate(about.low) + _AT_END:
            return 0.0
        if place > about.coordinate(about.high) - _AT_END:
            return math.inf
        return float(getattr(law, name))

    def _place(self, law: Law, name: str) -> float:
        place = float(self.form.constants()[name].coordinate(getattr(law, name)))
        for exponent, middle in self.log_middles.get(name, {}).items():
            place -= middle * float(getattr(law, exponent))
        return place


def huber_sums(residuals: Array) -> Array:
    """Sum over runs of Huber losses, float64 [...], of residuals [..., R]."""
    size = np.abs(residuals)
    quadratic = np.minimum(size, HUBER_WIDTH)
    return np.asarray((quadratic * (size - quadratic / 2)).sum(-1))


def residuals_at(coordinates: Coordinates, free_PF: Array, runs: Runs) -> Array:
    """Log predicted minus log observed losses of many laws.

    Args:
        coordinates: What is free.
        free_PF: float64 [P, F].
        runs: What the laws are held against.

    Returns:
        float64 [P, R].
    """
    constants_PK = coordinates.constants(free_PF)
    # Far from any fit a power may leave the range of floats: its sum is infinite, and loses.
    with np.errstate(all="ignore"):
        predicted = coordinates.form.log_loss(
            constants_PK[:, None], runs.num_parameters, runs.num_tokens, runs.unique_tokens
        )
    return predicted - np.log(runs.losses)


def descend(coordinates: Coordinates, start_F: Array, runs: Runs) -> tuple[Array, float]:
    """Lowers the objective from one start, by L-BFGS within the ends of the search.

    Args:
        coordinates: What is free.
        start_F: float64 [F], where to begin.
        runs: What is fitted.

    Returns:
        Coordinates [F] and the objective; infinite where the start has none.
    """
    num_free = len(start_F)
    steps = np.concatenate([np.zeros((1, num_free)), np.eye(num_free)]) * _STEP

    def value_and_gradient(free_F: Array) -> tuple[float, Array]:
        found = np.nan_to_num(residuals_at(coordinates, free_F + steps, runs), nan=1e3)
        slopes_FR = (found[1:] - found[0]) / _STEP
        pull_R = np.clip(found[0], -HUBER_WIDTH, HUBER_WIDTH)
        # In units of the width squared, so that exact runs are fitted exactly too.
        return float(huber_sums(found[0])) / HUBER_WIDTH**2, slopes_FR @ pull_R / HUBER_WIDTH**2

    if not num_free:
        return start_F, float(huber_sums(residuals_at(coordinates, start_F[None], runs)[0]))
    options = {"maxiter": 2000, "ftol": _TOLERANCE, "gtol": 1e-4}
    bounds = list(zip(*coordinates.ends(), strict=True))
    found = minimize(
        value_and_gradient, start_F, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return found.x, float(found.fun) * HUBER_WIDTH**2
