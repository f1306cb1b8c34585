"""The critical compute: how many FLOPs on U unique tokens make diffusion as good as autoregression.

All compute is 6 N D FLOPs, N counted as the two laws or the measured curves do, both alike. All U
are tokens. What has been published of it is in `published`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import (
    Interval,
    degrees_of_mean,
    mean_with_standard_error,
    percentile_interval,
    student_interval,
)
from megatron_mdm.studies.laws.allocation import best_sizes
from megatron_mdm.studies.laws.forms import Array, Law

# Budgets looked at between the lowest and the highest, before the crossing is narrowed down.
_BUDGETS = 200
_LAWS_AT_ONCE = 50


@dataclass(frozen=True)
class CriticalCompute:
    """Where MDM catches up with AR.

    Attributes:
        verdict: `crosses`; `never`: AR is ahead as far as was looked; `always`: AR never is;
            `tie`: neither ever is.
        flops: The crossing; None where there is none.
        interval: With `CONFIDENCE`, over resamples or seeds. 0 at the low end: in some of them MDM
            is ahead from the start; infinite at the high end: in some AR stays ahead. None without
            resamples, or of one seed.
        share_crossing: Share of the resamples or seeds that cross.
    """

    verdict: Literal["crosses", "never", "always", "tie"]
    flops: float | None
    interval: Interval | None = None
    share_crossing: float | None = None


class LossCurve(NamedTuple):
    """Best loss so far against compute.

    Attributes:
        flops: Ascending.
        losses: The best held-out loss reached with so many FLOPs, nats per token.
    """

    flops: Sequence[float]
    losses: Sequence[float]


def critical_flops_of_laws(
    ar: Law,
    mdm: Law,
    *,
    unique_tokens: float,
    lowest_flops: float = 1e12,
    highest_flops: float = 1e28,
    ar_bootstrap: Sequence[Law] = (),
    mdm_bootstrap: Sequence[Law] = (),
) -> CriticalCompute:
    """The least compute from which the best MDM is at least as good as the best AR model.

    Both are the best of all N with D = C / (6 N). Laws fitted to large runs may put MDM ahead at
    budgets far below these; such a lead does not count: the crossing is where AR has been ahead.

    Args:
        ar: Law of AR models.
        mdm: Law of MDMs; it counts N as the other does, and so are the FLOPs counted.
        unique_tokens: U.
        lowest_flops: Where to begin looking.
        highest_flops: Where to end.
        ar_bootstrap: Resamples of the AR law; paired in order with those of the other.
        mdm_bootstrap: Resamples of the MDM law.

    Returns:
        The crossing of the laws, with the interval over the resamples.

    Raises:
        DataError: A number is out of range, or only one law has resamples.
    """
    for name, value in (("unique_tokens", unique_tokens), ("lowest_flops", lowest_flops)):
        if not 0 < value < math.inf:
            raise DataError(f"{name}={value} is not valid: give a positive, finite number.")
    if not lowest_flops < highest_flops < math.inf:
        raise DataError(f"highest_flops={highest_flops} is not above {lowest_flops}.")
    if bool(ar_bootstrap) != bool(mdm_bootstrap):
        raise DataError("An interval needs the resamples of both laws: fit both with --bootstrap.")
    if ar == mdm:
        return CriticalCompute("tie", None)
    ends = math.log(lowest_flops), math.log(highest_flops)
    found = _verdict(_crossings([ar], [mdm], unique_tokens, ends)[0])
    num_pairs = min(len(ar_bootstrap), len(mdm_bootstrap))
    if not num_pairs:
        return found
    values: list[float] = []
    for first in range(0, num_pairs, _LAWS_AT_ONCE):
        last = min(first + _LAWS_AT_ONCE, num_pairs)
        values += _crossings(
            ar_bootstrap[first:last], mdm_bootstrap[first:last], unique_tokens, ends
        )
    return CriticalCompute(
        found.verdict, found.flops, percentile_interval(values), _share_crossing(values)
    )


def critical_flops_of_curves(
    curves_per_seed: Sequence[tuple[LossCurve, LossCurve]],
) -> CriticalCompute:
    """Where measured curves cross.

    Between two points a curve is a line in log FLOPs; after its last point it stays, since what has
    been reached is not lost.

    Args:
        curves_per_seed: AR and MDM, a pair for each seed.

    Returns:
        The geometric mean of the seeds' crossings with Student's interval if all cross. Otherwise
        their median, with an interval from the least to the greatest.

    Raises:
        DataError: There is no pair, or a curve is not valid.
    """
    if not curves_per_seed:
        raise DataError("A crossing needs the curves of at least one seed.")
    values = [_crossing_of_curves(ar, mdm) for ar, mdm in curves_per_seed]
    if len(values) == 1:
        return _verdict(values[0])
    share = _share_crossing(values)
    if share < 1:
        middle = _verdict(sorted(values)[(len(values) - 1) // 2])
        spread = Interval(min(values), max(values))
        return CriticalCompute(middle.verdict, middle.flops, spread, share)
    logs = np.log(values)
    center, error = mean_with_standard_error(logs)
    ends = student_interval(center, error, degrees_of_mean(len(logs)))
    return CriticalCompute("crosses", math.exp(center), Interval(*map(math.exp, ends)), share)


def _verdict(flops: float) -> CriticalCompute:
    if flops == 0:
        return CriticalCompute("always", None)
    return CriticalCompute("crosses", flops) if flops < math.inf else CriticalCompute("never", None)


def _share_crossing(values: Sequence[float]) -> float:
    return sum(0 < value < math.inf for value in values) / len(values)


def _crossings(
    ars: Sequence[Law], mdms: Sequence[Law], unique_tokens: float, ends: tuple[float, float]
) -> list[float]:
    """A crossing for each pair of laws: FLOPs, 0 where AR is never ahead, infinity where always."""
    grid_C = np.linspace(*ends, _BUDGETS)
    gaps_LC = _gaps(ars, mdms, unique_tokens, grid_C)
    crossings = []
    for ar, mdm, gaps_C in zip(ars, mdms, gaps_LC, strict=True):
        index = _first_crossing(gaps_C)
        if index is None:
            crossings.append(math.inf if gaps_C[-1] > 0 else 0.0)
            continue

        def gap(log_flops: float, ar: Law = ar, mdm: Law = mdm) -> float:
            return float(_gaps([ar], [mdm], unique_tokens, np.array([log_flops]))[0, 0])

        crossings.append(math.exp(brentq(gap, grid_C[index], grid_C[index + 1], xtol=1e-9)))
    return crossings


def _gaps(ars: Sequence[Law], mdms: Sequence[Law], unique_tokens: float, logs_C: Array) -> Array:
    """Best MDM loss minus best AR loss, float64 [laws, C]."""
    mdm, ar = (best_sizes(laws, np.exp(logs_C), unique_tokens)[1] for laws in (mdms, ars))
    return mdm - ar


def _first_crossing(gaps: Array) -> int | None:
    """The first index at which AR is ahead, and is no more at the next."""
    (found,) = np.nonzero((gaps[:-1] > 0) & (gaps[1:] <= 0))
    return int(found[0]) if len(found) else None


def _crossing_of_curves(ar: LossCurve, mdm: LossCurve) -> float:
    """FLOPs of the first crossing, 0 where AR is never ahead, infinity where it ends ahead."""
    for name, curve in (("AR", ar), ("MDM", mdm)):
        flops = np.asarray(curve.flops, dtype=np.float64)
        is_valid = len(flops) == len(curve.losses) > 0 and np.isfinite(curve.losses).all()
        if not (is_valid and (flops > 0).all() and (np.diff(flops) > 0).all()):
            raise DataError(
                f"The {name} curve is not valid: give ascending FLOPs above 0 and as many finite "
                "losses."
            )
    # Before its first point a curve is not known; the comparison begins with the later of the two.
    begin = max(ar.flops[0], mdm.flops[0])
    points = np.unique([begin, *(f for f in (*ar.flops, *mdm.flops) if f > begin)])
    heights = [
        np.interp(np.log(points), np.log(curve.flops), np.minimum.accumulate(curve.losses))
        for curve in (ar, mdm)
    ]
    gaps = heights[1] - heights[0]
    index = _first_crossing(gaps)
    if index is None:
        return math.inf if gaps[-1] > 0 else 0.0
    share = gaps[index] / (gaps[index] - gaps[index + 1])
    first, last = math.log(points[index]), math.log(points[index + 1])
    return math.exp(first + share * (last - first))
