"""Fits of scaling laws to finished runs: Huber loss on logarithms, L-BFGS, many starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from megatron_mdm.errors import DataError
from megatron_mdm.laws.forms import DataConstrainedLaw, log_loss

_HUBER_WIDTH = 1e-3
_NAMES = tuple(field.name for field in fields(DataConstrainedLaw))


@dataclass(frozen=True)
class Runs:
    """Finished runs, one a row.

    Attributes:
        num_parameters: float64 [R], N, without embeddings.
        num_tokens: float64 [R], tokens trained on, D.
        unique_tokens: float64 [R], how many of them differ, U.
        losses: float64 [R], held-out loss, nats per token.

    Raises:
        DataError: Numbers are not positive and finite, or the lengths differ.
    """

    num_parameters: Tensor
    num_tokens: Tensor
    unique_tokens: Tensor
    losses: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            wrong = ~(torch.isfinite(values) & (values > 0))
            if values.shape != self.losses.shape or wrong.any():
                row = int(wrong.nonzero()[0]) if wrong.any() else len(values)
                found = f"{float(values[row])}" if wrong.any() else f"{len(values)} rows"
                raise DataError(
                    f"{field.name} of run {row} is {found}: every run needs a positive, finite "
                    "number of each; leave out runs that failed."
                )

    def __len__(self) -> int:
        return len(self.losses)


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
        law: The best of all starts.
        objective: Sum of Huber losses of its log residuals.
        num_starts: How many fits were started.
    """

    law: DataConstrainedLaw
    objective: float
    num_starts: int


def objective(law: DataConstrainedLaw, runs: Runs) -> float:
    """Sum over runs of Huber(log predicted - log observed), width 1e-3.

    Args:
        law: Any law.
        runs: What it is held against.

    Returns:
        The objective of arXiv 2203.15556, section 3.3; 0 for a perfect law.
    """
    constants = torch.tensor([getattr(law, name) for name in _NAMES], dtype=torch.float64)
    return float(_huber(constants, runs))


def fit_law(runs: Runs, start: DataConstrainedLaw, starts: Mapping[str, Sequence[float]]) -> Fit:
    """Fits some constants of a law, from every combination of starts, and holds the others.

    Args:
        runs: At least one more than there are constants to fit.
        start: Gives the constants that are held.
        starts: For each constant to fit, where to begin.

    Returns:
        The best fit.

    Raises:
        DataError: There are too few runs, or no start ends in a finite objective.
    """
    names = tuple(starts)
    unknown = set(names) - set(_NAMES)
    if unknown:
        raise ValueError(f"no constants of a law: {unknown}")
    if len(runs) <= len(names):
        raise DataError(
            f"{len(runs)} runs are too few to fit {len(names)} constants: give at least "
            f"{len(names) + 1}, better three times as many."
        )
    fits = [
        _fit_from(runs, replace(start, **dict(zip(names, values, strict=True))), names)
        for values in itertools.product(*starts.values())
    ]
    best = min(fits, key=lambda fit: fit.objective)
    if not math.isfinite(best.objective):
        raise DataError(
            f"None of {len(fits)} starts ends in a finite objective: give starts nearer to the "
            "constants that you expect."
        )
    return Fit(best.law, best.objective, len(fits))


def _fit_from(runs: Runs, start: DataConstrainedLaw, names: Iterable[str]) -> Fit:
    indices = [_NAMES.index(name) for name in names]
    held = torch.tensor([getattr(start, name) for name in _NAMES], dtype=torch.float64)

    def value_and_gradient(logs: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logs_F = torch.tensor(logs, requires_grad=True)
        constants = held.index_copy(0, torch.tensor(indices), logs_F.exp())
        value = _huber(constants, runs)
        (gradient_F,) = torch.autograd.grad(value, logs_F)
        return float(value.detach()), gradient_F.numpy()

    found = minimize(
        value_and_gradient,
        held[indices].log().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10},
    )
    values = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    result = float(found.fun) if np.isfinite(found.fun) else math.inf
    return Fit(replace(start, **values), result, 1)


def _huber(constants_7: Tensor, runs: Runs) -> Tensor:
    predicted = log_loss(constants_7, runs.num_parameters, runs.num_tokens, runs.unique_tokens)
    return torch.nn.functional.huber_loss(
        predicted, runs.losses.log(), reduction="sum", delta=_HUBER_WIDTH
    )
