"""Best numbers of epochs read off curves of held-out loss, without any form of a law.

Letters: K points of a curve, of which J lie near its minimum; N windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import (
    Interval,
    clustered_mean,
    degrees_of_sum,
    student_reach,
)
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.reporting.run_folder import RunFolder, open_run
from megatron_mdm.studies.laws.best_epochs import is_same_place
from megatron_mdm.studies.laws.forms import Array
from megatron_mdm.studies.laws.runs import RunsTable, num_distinct

# What goes through the points near the minimum, the first that does: its degree, how far the points
# reach from its lowest place, as a factor, and how many they are at least.
_SHAPES = ((3, 2.0, 6), (3, 3.0, 6), (2, 2.0, 4), (2, 4.0, 4), (2, 8.0, 3))
_ROUNDS = 4
_FEWEST = 3


@dataclass(frozen=True)
class EpochCurve:
    """Held-out losses against epochs, of one size on so many unique tokens.

    Attributes:
        name: Of the run, or what its runs have in common.
        num_parameters: N.
        unique_tokens: U.
        epochs: float64 [K], ascending.
        losses: float64 [K], nats per token.
        windows_KN: float64 [K, N], the losses of the held-out windows that all K judged; None where
            they are not known, or not the same.
        document_N: int64 [N], number of the document that each is of.
    """

    name: str
    num_parameters: float
    unique_tokens: float
    epochs: Array
    losses: Array
    windows_KN: Array | None = None
    document_N: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class CurveMinimum:
    """Where a curve has its minimum.

    Attributes:
        curve: The curve.
        epochs: The lowest place of the polynomial through the points near it; None where the curve
            falls to its end, rises from its beginning, or has too few points.
        loss: The loss there, nats per token; the least that was measured where there is none.
        log_error: Standard error of log `epochs`; nan where nothing tells it.
        degrees: Of freedom of it.
        interval: Open above where the loss at the last point is not told from the least; None
            where nothing tells it.
    """

    curve: EpochCurve
    epochs: float | None
    loss: float
    log_error: float = math.nan
    degrees: float = 0.0
    interval: Interval | None = None

    @property
    def is_found(self) -> bool:
        """Whether it is known from both sides."""
        return self.epochs is not None and not (
            self.interval is not None and math.isinf(self.interval.high)
        )


def read_folder_curves(table: RunsTable, folder: Path) -> list[EpochCurve]:
    """Reads the validations of the runs of a table.

    Args:
        table: Names, N and U of the runs.
        folder: Holds a folder for each run, of its name.

    Returns:
        A curve for each run, over the tokens that AR and MDM both predict.

    Raises:
        DataError: A run has no folder, no validation that is finite, or damaged files.
    """
    sizes = zip(table.runs.num_parameters.tolist(), table.runs.unique_tokens.tolist(), strict=True)
    return [
        _read_curve(open_run(folder / name), name, *place)
        for name, place in zip(table.names, sizes, strict=True)
    ]


def _read_curve(run: RunFolder, name: str, parameters: float, unique: float) -> EpochCurve:
    records = [one for one in run.validations if math.isfinite(one[NLL]) and one.get("epoch")]
    if not records:
        raise DataError(
            f"{run.path} has no finite held-out loss with its epoch in metrics.jsonl: validate the "
            "run, or leave it out."
        )
    windows = [run.windows.get(int(one["step"])) for one in records]
    together = _stack([one for one in windows if one is not None], len(records))
    epochs, losses = (np.array([float(one[key]) for one in records]) for key in ("epoch", NLL))
    return EpochCurve(name, parameters, unique, epochs, losses, *together)


def _stack(
    judged: Sequence[JudgedWindows], count: int
) -> tuple[Array | None, NDArray[np.int64] | None]:
    """The windows' losses, and their documents, if all validations judged the same ones."""
    told = {(one.windows, one.noise_seed, one.draws_per_sample) for one in judged}
    if len(judged) != count or len(told) > 1:
        return None, None
    return np.stack([one.get_losses("nll_given_first") for one in judged]), judged[0].document_N


def gather_table_curves(table: RunsTable) -> list[EpochCurve]:
    """Makes a curve of all runs of one size on so many unique tokens.

    Args:
        table: Runs, each trained to an end of its own.

    Returns:
        A curve for each N and U with at least three numbers of epochs.

    Raises:
        DataError: There is none.
    """
    runs = table.runs
    pairs = list(zip(runs.num_parameters.tolist(), runs.unique_tokens.tolist(), strict=True))
    left, curves = list(range(len(runs))), []
    while left:
        place = pairs[left[0]]
        rows = [row for row in left if is_same_place(pairs[row], place)]
        left = [row for row in left if row not in rows]
        some = runs.take(np.array(rows)[np.argsort(runs.epochs[rows], kind="stable")])
        if num_distinct(some.epochs) >= _FEWEST:
            name = f"N={place[0]:.3g}, U={place[1]:.3g}"
            curves.append(EpochCurve(name, *place, some.epochs, some.losses))
    if not curves:
        raise DataError(
            "No size has runs of three different numbers of epochs on the same unique tokens: add "
            "such runs, or give the runs' folders (--folders) for the curves of their validations."
        )
    return curves


def find_minima(curves: Sequence[EpochCurve]) -> list[CurveMinimum]:
    """Finds where curves are lowest, by a polynomial in log epochs near there.

    By least squares: a cubic, since losses rise more steeply than they fall, through the points
    within a factor of two or three of its own lowest place; where these are fewer than six, a
    parabola through those within two, four or eight. Besides its error such a minimum may be off
    by a few hundredths of a logarithm, in the same direction at every U and N: a parabola puts a
    lopsided minimum too low.

    The error has two parts. What the choice of held-out windows does comes from the windows: the
    lowest place moves with a weighted sum of the losses, so it has a value for each window, in
    which what makes a window hard at all times cancels. What training itself does is in how the
    points lie around the polynomial, and is taken to be the same for all curves.

    Args:
        curves: Of at least one point each.

    Returns:
        For each curve its minimum; without one if the lowest point is the first or the last, or
        nothing bends upward around it.
    """
    fitted = [_fit_near_minimum(curve) for curve in curves]
    squares, degrees = 0.0, 0
    for curve, one in zip(curves, fitted, strict=True):
        if isinstance(one, _Fitted):
            shifts_J = np.log(curve.epochs[one.rows_J]) - one.center
            rest_J = curve.losses[one.rows_J] - np.polyval(one.coefficients_C, shifts_J)
            squares += float(rest_J @ rest_J)
            degrees += len(rest_J) - len(one.coefficients_C)
    noise = math.sqrt(squares / degrees) if degrees else 0.0
    return [
        _with_error(curve, one, noise, degrees) if isinstance(one, _Fitted) else one
        for curve, one in zip(curves, fitted, strict=True)
    ]


def _fit_near_minimum(curve: EpochCurve) -> _Fitted | CurveMinimum:
    logs_K = np.log(curve.epochs)
    lowest = int(curve.losses.argmin())
    least, place = float(curve.losses[lowest]), float(logs_K[lowest])
    if place >= logs_K[-1]:
        ends = Interval(float(curve.epochs[-1]), math.inf)
        return CurveMinimum(curve, None, least, interval=ends)
    if place <= logs_K[0]:
        return CurveMinimum(curve, None, least, interval=Interval(0.0, float(curve.epochs[0])))
    for degree, factor, fewest in _SHAPES:
        found = _settle(curve, place, degree, math.log(factor), fewest)
        if found is not None:
            return found
    return CurveMinimum(curve, None, least)


class _Fitted(NamedTuple):
    """A polynomial near the minimum of a curve.

    Attributes:
        rows_J: Points that it went through.
        solve_CJ: Makes coefficients, the highest power first, of their losses.
        center: Log epochs at which its argument is 0.
        coefficients_C: Its coefficients.
        lowest: Its argument where it is lowest.
    """

    rows_J: NDArray[np.int64]
    solve_CJ: Array
    center: float
    coefficients_C: Array
    lowest: float


def _settle(
    curve: EpochCurve, center: float, degree: int, reach: float, fewest: int
) -> _Fitted | None:
    """A polynomial through the points around its lowest place; None where it has none there."""
    logs_K = np.log(curve.epochs)
    found = None
    for _ in range(_ROUNDS):
        near = np.abs(logs_K - center) <= reach
        # At least the next on either side.
        below, above = logs_K[logs_K < center], logs_K[logs_K > center]
        near |= logs_K == below.max(initial=-math.inf)
        near |= logs_K == above.min(initial=math.inf)
        rows_J = np.nonzero(near)[0]
        logs_J = logs_K[rows_J]
        if len(np.unique(logs_J)) < fewest:
            return None
        solve_CJ = np.linalg.pinv(np.vander(logs_J - center, degree + 1))
        coefficients_C = solve_CJ @ curve.losses[rows_J]
        lowest = _lowest_place(coefficients_C)
        if lowest is None or not logs_J.min() <= center + lowest <= logs_J.max():
            return None
        found = _Fitted(rows_J, np.asarray(solve_CJ), center, coefficients_C, lowest)
        if abs(lowest) < 1e-6:
            break
        center += lowest
    return found


def _lowest_place(coefficients_C: Array) -> float | None:
    """Where a parabola or cubic has its minimum; None without one."""
    cubic = float(coefficients_C[-4]) if len(coefficients_C) > 3 else 0.0
    curvature, slope = coefficients_C[-3:-1].tolist()
    inside = curvature**2 - 3 * cubic * slope
    if inside <= 0 or curvature + math.sqrt(inside) <= 0:
        return None
    return float(-slope / (curvature + math.sqrt(inside)))


def _with_error(curve: EpochCurve, fitted: _Fitted, noise: float, degrees: int) -> CurveMinimum:
    derivative_C = np.polyder(fitted.coefficients_C)
    bend = float(np.polyval(np.polyder(derivative_C), fitted.lowest))
    # How the lowest place moves with each loss: minus the slope there that the loss adds.
    slopes_J = [np.polyval(np.polyder(one_C), fitted.lowest) for one_C in fitted.solve_CJ.T]
    pull_J = -np.array(slopes_J) / bend
    parts: list[tuple[float, float]] = []
    if degrees:
        parts.append((noise * float(np.linalg.norm(pull_J)), degrees))
    if curve.windows_KN is not None and curve.document_N is not None:
        values_N = pull_J @ curve.windows_KN[fitted.rows_J]
        parts.append(_error_over_documents(values_N, curve.document_N))
    best = fitted.center + fitted.lowest
    loss = float(np.polyval(fitted.coefficients_C, fitted.lowest))
    if not parts:
        return CurveMinimum(curve, math.exp(best), loss)
    errors, degrees_of = zip(*parts, strict=True)
    error, freedom = math.hypot(*errors), degrees_of_sum(errors, degrees_of)
    reach = student_reach(error, freedom)
    ends = Interval(math.exp(best - reach), math.exp(best + reach))
    nearest = int(np.abs(np.log(curve.epochs) - best).argmin())
    if not _rises(curve, nearest, noise, degrees):
        ends = Interval(ends.low, math.inf)
    return CurveMinimum(curve, math.exp(best), loss, error, freedom, ends)


def _rises(curve: EpochCurve, lowest: int, noise: float, degrees: int) -> bool:
    """Whether the loss at the last point is above that at another by more than their errors."""
    errors = [(math.sqrt(2) * noise, float(degrees))] if degrees else []
    if curve.windows_KN is not None and curve.document_N is not None:
        rise_N = curve.windows_KN[-1] - curve.windows_KN[lowest]
        errors.append(_error_over_documents(rise_N, curve.document_N))
    if not errors:
        return bool(curve.losses[-1] > curve.losses[lowest])
    sizes, degrees_of = zip(*errors, strict=True)
    reach = student_reach(math.hypot(*sizes), degrees_of_sum(sizes, degrees_of))
    return bool(curve.losses[-1] - curve.losses[lowest] > reach)


def _error_over_documents(values_N: Array, document_N: NDArray[np.int64]) -> tuple[float, float]:
    """The larger of both errors of a mean, and its degrees of freedom."""
    _, error, clustered = clustered_mean(values_N, document_N)
    num_documents = len(np.unique(document_N))
    if num_documents > 1 and not clustered < error:
        return clustered, num_documents - 1
    return error, len(values_N) - 1
