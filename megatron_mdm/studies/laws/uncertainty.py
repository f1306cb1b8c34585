"""How far a law is known: fits to runs drawn again, and the intervals that they give.

Letters as in `descent`; S starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, percentile_interval
from megatron_mdm.studies.laws.descent import Coordinates, descend, limit_reached, sums_at
from megatron_mdm.studies.laws.fitting import Fit, starts_near
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.runs import Runs

# Of the starts of a problem, so many are descended from.
_STARTS_DESCENDED = 3
_RESAMPLES_AT_ONCE = 100


def constant_interval(laws: Sequence[Law], name: str) -> Interval:
    """Where a constant lies, open where resamples ran off to where the search ends.

    Args:
        laws: Resamples.
        name: The constant.

    Returns:
        The percentile interval.
    """
    values = [float(getattr(law, name)) for law in laws]
    ends = (0.0, math.inf)
    at_end = [limit_reached(name, value) for value in values]
    return percentile_interval(
        [value if end is None else ends[end] for value, end in zip(values, at_end, strict=True)]
    )


def bootstrap(runs: Runs, fit: Fit, num_resamples: int, seed: int = 0) -> list[Law]:
    """Fits again to runs drawn with replacement.

    Each resample is descended from the best of several starts: the fit, its other minima, and the
    fit with other reuses.

    Args:
        runs: What was fitted.
        fit: The fit.
        num_resamples: How often, at least 1.
        seed: Of the draws.

    Returns:
        A law for each resample.
    """
    if num_resamples < 1:
        raise DataError(f"--bootstrap {num_resamples} is not valid: give a number above 0.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(runs), (num_resamples, len(runs)), generator=generator)
    counts = torch.zeros(num_resamples, len(runs), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    laws: list[Law] = []
    held_K = torch.tensor(fit.law.values(), dtype=torch.float64)
    for some in counts.split(_RESAMPLES_AT_ONCE):
        best_PF, _ = descend_from_best(fit.coordinates, starts_near(fit), held_K, runs, some)
        constants = fit.coordinates.constants(best_PF, held_K.expand(len(some), -1))
        laws += [type(fit.law).from_values(row) for row in constants.tolist()]
    return laws


def descend_from_best(
    coordinates: Coordinates, start_SF: Tensor, held: Tensor, runs: Runs, weights_PR: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves each of many problems from the best of the same starts.

    Args:
        coordinates: What is free.
        start_SF: float64 [S, F].
        held: float64 [K] or [P, K].
        runs: What is fitted.
        weights_PR: float64 [P, R], how often each run counts.

    Returns:
        Coordinates [P, F] and objectives [P].
    """
    (num_starts, _), num_problems = start_SF.shape, len(weights_PR)
    held_PK = held.expand(num_problems, -1)
    sums_PS = sums_at(
        coordinates,
        start_SF.repeat(num_problems, 1),
        held_PK.repeat_interleave(num_starts, 0),
        runs,
        weights_PR.repeat_interleave(num_starts, 0),
    ).view(num_problems, num_starts)
    kept_PS = sums_PS.nan_to_num(math.inf).argsort(1)[:, :_STARTS_DESCENDED]
    num_kept = kept_PS.shape[1]
    ends, sums = descend(
        coordinates,
        start_SF[kept_PS].flatten(0, 1),
        held_PK.repeat_interleave(num_kept, 0),
        runs,
        weights_PR.repeat_interleave(num_kept, 0),
    )
    sums_PS = sums.view(num_problems, num_kept)
    best_P = sums_PS.argmin(1)
    ends_PSF = ends.view(num_problems, num_kept, -1)
    return ends_PSF[torch.arange(num_problems), best_P], sums_PS.min(1).values


def predicted_losses(
    laws: Sequence[Law], num_parameters: Tensor, num_tokens: Tensor, unique_tokens: Tensor
) -> Tensor:
    """Losses that each of several laws of one form expects.

    Args:
        laws: Such as the resamples of a bootstrap.
        num_parameters: float64 [R], N.
        num_tokens: float64 [R], D.
        unique_tokens: float64 [R], U.

    Returns:
        float64 [laws, R], nats per token.
    """
    constants = torch.tensor([law.values() for law in laws], dtype=torch.float64)
    logs = type(laws[0]).log_loss(constants[:, None], num_parameters, num_tokens, unique_tokens)
    return logs.exp()
