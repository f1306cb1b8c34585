"""How best numbers of epochs move with unique tokens and parameters: E* = K U^a / N^b.

Letters: P points, C coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, student_interval
from megatron_mdm.studies.laws.epoch_curves import CurveMinimum
from megatron_mdm.studies.laws.forms import Array
from megatron_mdm.studies.laws.runs import num_distinct

# U and N tell two exponents apart unless one follows the other this closely.
_MOST_CORRELATED = 0.999


class Exponent(NamedTuple):
    """One exponent of a power law.

    Attributes:
        value: The exponent.
        interval: Where it lies; None where there are no more points than coefficients.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class EpochsLaw:
    """E* = K U^a / N^b, by least squares in logarithms.

    Attributes:
        log_scale: log K.
        unique_exponent: a; None where U does not vary.
        parameter_exponent: b; None where N does not vary.
        scatter: Standard deviation of log E* around the law beyond the errors of the points.
        num_points: How many minima it went through.
    """

    log_scale: float
    unique_exponent: Exponent | None
    parameter_exponent: Exponent | None
    scatter: float
    num_points: int

    def at(self, *, num_parameters: float, unique_tokens: float) -> float:
        """The best number of epochs that it expects."""
        found = self.log_scale
        if self.unique_exponent is not None:
            found += self.unique_exponent.value * math.log(unique_tokens)
        if self.parameter_exponent is not None:
            found -= self.parameter_exponent.value * math.log(num_parameters)
        return math.exp(found)


def fit_epochs_law(minima: Sequence[CurveMinimum]) -> EpochsLaw:
    """Fits a power law through minima that are known from both sides.

    The weight of a point is 1 / (error^2 + scatter^2), with the scatter for which the weighted
    squares are as many as their degrees of freedom: seeds, and what no power law can follow.
    Minima that no curve has passed are left out, so that where only small models or little data
    show theirs the exponents are of those.

    Args:
        minima: Of curves.

    Returns:
        The law.

    Raises:
        DataError: Too few minima are known, or U and N move together.

    Source:
        Paule and Mandel, "Consensus values and weighting factors", 1982, for the scatter.
    """
    found = [one for one in minima if one.is_found and one.epochs is not None]
    sizes, unique = (
        np.array([getattr(one.curve, name) for one in found], dtype=np.float64)
        for name in ("num_parameters", "unique_tokens")
    )
    varies = [len(found) > 0 and num_distinct(values) > 1 for values in (unique, sizes)]
    num_coefficients = 1 + sum(varies)
    if len(found) < 2 or num_coefficients < 2 or len(found) < num_coefficients:
        raise DataError(
            f"{len(found)} of {len(minima)} curves show a minimum, too few for a power law of the "
            "best number of epochs: it needs two different U or N, and three to tell both apart."
        )
    columns = [np.ones(len(found))]
    columns += [np.log(unique)] * varies[0] + [-np.log(sizes)] * varies[1]
    if all(varies) and abs(np.corrcoef(columns[1], columns[2])[0, 1]) > _MOST_CORRELATED:
        raise DataError(
            "U and N of the curves that show a minimum move together, so that the exponents of "
            "neither can be told: vary one with the other kept."
        )
    logs_P = np.log([float(one.epochs or math.nan) for one in found])
    errors_P = np.nan_to_num([one.log_error for one in found])
    values_C, spread_C, scatter = _fit(np.stack(columns, axis=1), logs_P, errors_P)
    degrees = len(found) - num_coefficients
    exponents = [
        Exponent(value, student_interval(value, error, degrees) if degrees else None)
        for value, error in zip(values_C[1:].tolist(), spread_C[1:].tolist(), strict=True)
    ]
    placed = iter(exponents)
    of_unique, of_parameters = (next(placed) if one else None for one in varies)
    return EpochsLaw(float(values_C[0]), of_unique, of_parameters, scatter, len(found))


def _fit(columns_PC: Array, logs_P: Array, errors_P: Array) -> tuple[Array, Array, float]:
    """Coefficients, their standard errors, and the scatter beyond the errors of the points."""
    degrees = len(logs_P) - columns_PC.shape[1]

    def solve(scatter: float) -> tuple[Array, Array, float]:
        # Without any error all points weigh alike.
        variances_P = errors_P**2 + scatter**2
        roots_P = 1 / np.sqrt(np.where(variances_P > 0, variances_P, 1.0))
        scaled_PC = columns_PC * roots_P[:, None]
        inverse_CP = np.linalg.pinv(scaled_PC)
        values_C = inverse_CP @ (logs_P * roots_P)
        rest_P = logs_P * roots_P - scaled_PC @ values_C
        return values_C, np.linalg.norm(inverse_CP, axis=1), float(rest_P @ rest_P)

    if degrees < 1:
        values_C, spread_C, _ = solve(0.0)
        return values_C, spread_C, 0.0
    most = 10 * float(np.std(logs_P)) + 1e-6
    low = 1e-9 if (errors_P <= 0).any() else 0.0
    scatter = 0.0
    if solve(low)[2] > degrees:
        scatter = float(brentq(lambda one: solve(one)[2] - degrees, low, most))
    values_C, spread_C, _ = solve(max(scatter, low))
    return values_C, spread_C, scatter
