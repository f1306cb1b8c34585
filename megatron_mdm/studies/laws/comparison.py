"""Which form predicts runs best that it was not fitted to.

A form with more constants always fits better; what it is worth shows on runs that were held out.
All forms predict the same runs, so differences of their errors are paired, run by run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import (
    ClusteredEstimate,
    Interval,
    clustered_mean,
    student_interval,
)
from megatron_mdm.studies.laws.best_epochs import is_same_place
from megatron_mdm.studies.laws.fitting import Fit, fit_law, refit
from megatron_mdm.studies.laws.forms import Array, Law
from megatron_mdm.studies.laws.runs import Runs, check_identifiable

HeldOut = Literal["largest", "pairs"]
# Of the runs, so many of the most compute are held out.
_LARGEST_SHARE = 0.2
# Two forms that differ by less, in nats per token, predict alike, however well that is known.
_NOTHING = 1e-3


@dataclass(frozen=True)
class FormErrors:
    """How well one form predicts the runs that it was not fitted to.

    Attributes:
        form: Its name.
        num_constants: How many were fitted.
        errors: float64 [H], predicted less observed loss of the held-out runs, nats per token.
        fitted_error: Mean absolute error over all runs of a fit to all of them.
        difference: Mean over the held-out runs of how much larger its absolute error is than that
            of the best form, with the error over places; None for the best one.
        interval: Of the difference; None for the best form, and of a single place.
        ratio: How many times as large its absolute error is, in the geometric mean over the
            held-out runs; None for the best form. A few runs far off weigh less in it.
        ratio_interval: Of the ratio, as of the difference.
    """

    form: str
    num_constants: int
    errors: Array
    fitted_error: float
    difference: ClusteredEstimate | None = None
    interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None

    @property
    def mean_error(self) -> float:
        """Mean absolute error, nats per token."""
        return float(np.abs(self.errors).mean())

    @property
    def root_mean_square(self) -> float:
        """Of the errors, nats per token."""
        return float(np.sqrt(np.square(self.errors).mean()))

    @property
    def is_worse(self) -> bool:
        """Whether its difference from the best form, or their ratio, is known to be a worse one.

        A difference of less than 0.001 nats is none.
        """
        if self.difference is None or self.interval is None or self.ratio_interval is None:
            return False
        is_known = self.interval.low > 0 or self.ratio_interval.low > 1
        return is_known and self.difference.mean > _NOTHING

    @property
    def bias(self) -> float:
        """Mean error; above 0 it expects too much."""
        return float(self.errors.mean())


@dataclass(frozen=True)
class FormComparison:
    """Forms by their errors on held-out runs, the best first.

    Attributes:
        held_out: Which runs: `largest`, those of the most compute; `pairs`, every size and unique
            tokens in turn.
        rows: int64 [H], the held-out runs among all, in the order of the errors.
        num_places: How many different N and U they have.
        forms: What each form came to.
    """

    held_out: HeldOut
    rows: NDArray[np.int64]
    num_places: int
    forms: tuple[FormErrors, ...]

    @property
    def verdict(self) -> str:
        """In one sentence, what the held-out runs say."""
        best, *others = self.forms
        alike = [one.form for one in others if not one.is_worse]
        worse = [one.form for one in others if one.form not in alike]
        parts = [f"{best.form} predicts the held-out runs best"]
        if worse:
            parts.append(f"worse than it: {', '.join(worse)}")
        if alike:
            parts.append(f"not told from it by these {len(self.rows)} runs: {', '.join(alike)}")
        return "; ".join(parts)


def compare_forms(
    runs: Runs,
    forms: Sequence[type[Law]],
    held_out: HeldOut = "largest",
    *,
    held: Mapping[str, float] | None = None,
    tie_exponents: bool = False,
) -> FormComparison:
    """Fits forms to some runs and lets them predict the others.

    With `largest` every form is fitted once, to the four fifths of the runs of the least compute
    6 N D. With `pairs` it is fitted once for each different N and U, to the runs of all others:
    from where a fit to all runs ended, which chooses among minima and nothing else.

    Args:
        runs: Finished runs.
        forms: At least two.
        held_out: Which runs to predict.
        held: Constants that keep a value, in the forms that have them.
        tie_exponents: Fit alpha = beta.

    Returns:
        The forms, by mean absolute error.

    Raises:
        DataError: There are too few forms or places, or the runs that are left cannot tell a form's
            constants.
    """
    if len({form.form for form in forms}) < max(len(forms), 2):
        raise DataError("A comparison needs at least two different forms.")
    place_R = _places(runs)
    folds = _folds(runs, place_R, held_out)
    rows = np.concatenate(folds)
    errors: list[FormErrors] = []
    for form in forms:
        own = {name: value for name, value in (held or {}).items() if name in form.names()}
        whole = fit_law(runs, form, held=own, tie_exponents=tie_exponents)
        laws = [_fit_without(runs, fold, whole, held_out) for fold in folds]
        pairs = zip(laws, folds, strict=True)
        gaps_H = np.concatenate([_gaps(law, runs.take(fold)) for law, fold in pairs])
        fitted = float(np.abs(_gaps(whole.law, runs)).mean())
        errors.append(FormErrors(form.form, len(whole.coordinates.free), gaps_H, fitted))
    errors.sort(key=lambda one: one.mean_error)
    place_H = place_R[rows]
    others = [_against(errors[0], one, place_H) for one in errors[1:]]
    return FormComparison(held_out, rows, len(np.unique(place_H)), (errors[0], *others))


def _places(runs: Runs) -> NDArray[np.int64]:
    """A number for each different N and U, int64 [R]."""
    found: list[tuple[float, float]] = []
    numbers = []
    for pair in zip(runs.num_parameters.tolist(), runs.unique_tokens.tolist(), strict=True):
        same = [index for index, one in enumerate(found) if is_same_place(one, pair)]
        if not same:
            found.append(pair)
        numbers.append(same[0] if same else len(found) - 1)
    return np.array(numbers, dtype=np.int64)


def _folds(runs: Runs, place_R: NDArray[np.int64], held_out: HeldOut) -> list[NDArray[np.int64]]:
    """Rows of the runs that are predicted by one fit, for each of the fits."""
    if held_out == "largest":
        count = max(1, round(_LARGEST_SHARE * len(runs)))
        return [np.sort(np.argsort(runs.flops, kind="stable")[-count:])]
    places = np.unique(place_R)
    if len(places) < 2:
        raise DataError(
            "All runs have one size and one number of unique tokens, so leaving them out leaves "
            "nothing: hold out the largest runs (--held-out largest)."
        )
    return [np.nonzero(place_R == place)[0] for place in places]


def _fit_without(runs: Runs, fold: NDArray[np.int64], whole: Fit, held_out: HeldOut) -> Law:
    coordinates = whole.coordinates
    rest = runs.take(np.setdiff1d(np.arange(len(runs)), fold))
    form, ties = coordinates.form, coordinates.tie_exponents
    try:
        if held_out == "largest":
            return fit_law(rest, form, held=coordinates.held, tie_exponents=ties).law
        check_identifiable(rest, form, coordinates.fitted, ties)
    except DataError as error:
        raise DataError(
            f"Without the {len(fold)} runs that are held out {form.form} cannot be fitted: {error}"
        ) from error
    return refit(whole, rest).law


def _gaps(law: Law, runs: Runs) -> Array:
    return runs.losses_of(law) - runs.losses


def _against(best: FormErrors, other: FormErrors, place_H: NDArray[np.int64]) -> FormErrors:
    sizes, best_sizes = (np.maximum(np.abs(one.errors), 1e-12) for one in (other, best))
    difference, ends = _mean_over_places(sizes - best_sizes, place_H)
    log_ratio, log_ends = _mean_over_places(np.log(sizes / best_sizes), place_H)
    ratio_ends = None if log_ends is None else Interval(*np.exp(log_ends).tolist())
    ratio = math.exp(log_ratio.mean)
    return replace(
        other, difference=difference, interval=ends, ratio=ratio, ratio_interval=ratio_ends
    )


def _mean_over_places(
    values_H: Array, place_H: NDArray[np.int64]
) -> tuple[ClusteredEstimate, Interval | None]:
    """A mean over runs, and its interval over places; None of a single one."""
    found, num_places = clustered_mean(values_H, place_H), len(np.unique(place_H))
    if num_places < 2:
        return found, None
    return found, student_interval(found.mean, found.clustered_error, num_places - 1)
