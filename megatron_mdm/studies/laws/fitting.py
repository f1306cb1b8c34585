"""Fits of scaling laws to finished runs: Huber loss on logarithms, many starts, L-BFGS.

Letters as in `coordinates`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.coordinates import Coordinates, descend, huber_sums, residuals_at
from megatron_mdm.studies.laws.forms import Array, Law
from megatron_mdm.studies.laws.runs import Runs, check_identifiable

# Of all starts, so many of the best are descended from; so many are looked at in one go.
_NUM_DESCENDED = 32
_NUM_AT_ONCE = 512
# Of the starts of a refit, so many.
_NUM_REFITTED = 3
# Other minima that are kept: no worse than this multiple of the best, and apart by this share.
_OTHER_OBJECTIVE = 1.2
_APART = 0.05
_MAX_OTHERS = 4
# Starts: E as a share of the loss, A / N^alpha and what overfitting costs of the rest.
_IRREDUCIBLE_SHARES = (0.15, 0.5, 0.8)
_PARAMETER_SHARES = (0.2, 0.5, 0.8)
_PENALTY_SHARES = (0.003, 0.03, 0.3)
# A refit also begins with reuses so far from the fit's, as coordinates.
_OTHER_REUSE = 1.5


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: The best that was found.
        objective: Sum of Huber losses of its log residuals.
        num_starts: How many starts were looked at.
        coordinates: What was fitted and what was held.
        others: Other minima nearly as low, best first.
    """

    law: Law
    objective: float
    num_starts: int
    coordinates: Coordinates
    others: tuple[Law, ...] = ()

    @property
    def fitted(self) -> tuple[str, ...]:
        """Constants that were fitted; the others were held."""
        return self.coordinates.fitted

    @property
    def at_limits(self) -> tuple[str, ...]:
        """Fitted constants that ran off to where the search ends: the runs do not tell them."""
        found = {name: self.coordinates.bounded(self.law, name) for name in self.fitted}
        return tuple(name for name, value in found.items() if not 0 < value < math.inf)


def residuals(law: Law, runs: Runs) -> Array:
    """Log predicted minus log observed loss, float64 [R]."""
    return np.log(runs.losses_of(law)) - np.log(runs.losses)


def objective(law: Law, runs: Runs) -> float:
    """Sum over runs of Huber(log predicted - log observed), width 1e-3.

    Args:
        law: Any law.
        runs: What it is held against.

    Returns:
        The objective of arXiv 2203.15556, section 3.3; 0 for a perfect law.
    """
    return float(huber_sums(residuals(law, runs)))


def r_squared(law: Law, runs: Runs) -> float:
    """Share of the variance of log losses that a law explains; below 0: less than a constant."""
    logs = np.log(runs.losses)
    squares = np.square(residuals(law, runs)).sum()
    return float(1 - squares / np.square(logs - logs.mean()).sum())


def fit_law(
    runs: Runs,
    form: type[Law],
    *,
    held: Mapping[str, float] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    tie_exponents: bool = False,
) -> Fit:
    """Fits the constants of a form that are not held.

    All starts are evaluated, and the best are descended from.

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
    quantities = (runs.num_parameters, runs.num_tokens, runs.unique_tokens)
    middles = form.log_middles(*(float(np.log(one).mean()) for one in quantities))
    coordinates = Coordinates(form, fitted, held, tie_exponents, middles)
    start_PF = np.stack([coordinates.of(law) for law in _starts(runs, form, held, starts or {})])
    ends = descend_from_best(coordinates, start_PF, runs, _NUM_DESCENDED)
    if not math.isfinite(ends[0][1]):
        raise DataError(
            f"None of {len(start_PF)} starts ends in a finite objective: hold constants near what "
            "you expect."
        )
    laws = [form.from_values(coordinates.constants(free_F)) for free_F, _ in ends]
    others = tuple(laws[index] for index in _other_minima(ends))
    return Fit(laws[0], ends[0][1], len(start_PF), coordinates, others)


def refit(
    fit: Fit, runs: Runs, coordinates: Coordinates | None = None, near: Sequence[Law] = ()
) -> Fit:
    """Fits again, to nearly the same runs or with a constant held elsewhere.

    Args:
        fit: Where to begin: at its law, its other minima, and its law with other reuses.
        runs: What is fitted.
        coordinates: What is free; by default what was.
        near: Laws to begin at besides.

    Returns:
        The lowest minimum that was found.
    """
    coordinates = coordinates or fit.coordinates
    starts = [coordinates.of(law) for law in (fit.law, *fit.others, *near)]
    for index, name in enumerate(coordinates.free):
        if name in coordinates.form.reuse_names:
            for shift in (-_OTHER_REUSE, _OTHER_REUSE):
                starts.append(starts[0] + shift * np.eye(len(starts[0]))[index])
    start_PF = np.clip(np.stack(starts), *coordinates.ends())
    free_F, lowest = descend_from_best(coordinates, start_PF, runs, _NUM_REFITTED)[0]
    law = coordinates.form.from_values(coordinates.constants(free_F))
    return Fit(law, lowest, len(starts), coordinates)


def descend_from_best(
    coordinates: Coordinates, start_PF: Array, runs: Runs, num_descended: int
) -> list[tuple[Array, float]]:
    """Descends from the best of some starts.

    Args:
        coordinates: What is free.
        start_PF: float64 [P, F].
        runs: What is fitted.
        num_descended: How many of the starts.

    Returns:
        Coordinates and objectives of the ends, the lowest first.
    """
    parts = range(0, len(start_PF), _NUM_AT_ONCE)
    sums_P = np.concatenate(
        [
            huber_sums(residuals_at(coordinates, start_PF[first : first + _NUM_AT_ONCE], runs))
            for first in parts
        ]
    )
    best = np.argsort(np.nan_to_num(sums_P, nan=math.inf), kind="stable")[:num_descended]
    ends = [descend(coordinates, start_PF[index], runs) for index in best]
    return sorted(ends, key=lambda end: end[1])


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
    for name, value in held.items():
        if not form.constants()[name].may_be(value):
            rule = "from 0 to 1" if form.constants()[name].is_fraction else "above 0"
            raise DataError(f"{name}={value} is not valid: give a number {rule}.")
    if tie_exponents and {"parameter_exponent", "token_exponent"} & set(held):
        raise DataError("A tied exponent cannot be held: hold both, or tie them without holding.")


def _starts(
    runs: Runs, form: type[Law], held: Mapping[str, float], given: Mapping[str, Sequence[float]]
) -> list[Law]:
    """Every combination of starts; scales follow from shares of the losses."""
    quantities = (runs.num_parameters, runs.num_tokens, runs.unique_tokens)
    middles = form.log_middles(*(float(np.log(np.median(one))) for one in quantities))
    typical, lowest = float(np.median(runs.losses)), float(runs.losses.min())
    values: dict[str, Sequence[float]] = {
        name: about.starts for name, about in form.constants().items()
    }
    values["irreducible_loss"] = [share * lowest for share in _IRREDUCIBLE_SHARES]
    values |= {name: tuple(some) for name, some in given.items()}
    values |= {name: (value,) for name, value in held.items()}
    others = [name for name in form.names() if name not in middles]
    sizes = [
        (share, 1 - share, penalty)
        for share, penalty in itertools.product(
            _PARAMETER_SHARES, _PENALTY_SHARES if form.penalty_names else (0.0,)
        )
    ]
    rows: set[tuple[float, ...]] = set()
    for shares, some in itertools.product(
        sizes, itertools.product(*(values[name] for name in others))
    ):
        named = dict(zip(others, some, strict=True))
        reducible = max(typical - named["irreducible_loss"], 0.1 * typical)
        scales = []
        for share, (scale, exponents) in zip(shares, middles.items(), strict=False):
            log_shift = sum(named[exponent] * middle for exponent, middle in exponents.items())
            scales.append(values[scale] or (share * reducible * math.exp(log_shift),))
        for found in itertools.product(*scales):
            named |= dict(zip(middles, found, strict=True))
            rows.add(tuple(named[name] for name in form.names()))
    return [form(*row) for row in sorted(rows)]


def _other_minima(ends: Sequence[tuple[Array, float]]) -> list[int]:
    """Minima besides the first that lie apart from it and from each other."""
    kept = [0]
    for index, (free_F, lowest) in enumerate(ends):
        gaps = [np.abs(free_F - ends[one][0]).max() for one in kept]
        is_low = lowest < _OTHER_OBJECTIVE * ends[0][1]
        if is_low and min(gaps) > _APART and len(kept) <= _MAX_OTHERS:
            kept.append(index)
    return kept[1:]
