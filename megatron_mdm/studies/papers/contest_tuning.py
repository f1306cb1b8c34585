"""Proposals of settings to try: a seeded sampler that is told what came of the ones before.

Nothing is kept: a contest that goes on asks for the same proposals again, tells what their runs
came to, and gets the next ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from megatron_mdm.studies.papers.contest_file import Range

# Random ones come first; after so many the sampler follows the results.
_NUM_RANDOM = 4


class Tuner:
    """Proposes settings of one contestant.

    Args:
        space: What is tuned, by dotted field.
        seed: Of the proposals.
        at_once: Proposals before results are told.

    Source:
        Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (tree-structured Parzen
        estimators), as Optuna has them.
    """

    def __init__(
        self, space: Mapping[str, Range | Sequence[Any]], seed: int, at_once: int = 1
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=_NUM_RANDOM, constant_liar=at_once > 1
        )
        self._study = optuna.create_study(sampler=sampler)
        self._space = {field: _make_distribution(one) for field, one in space.items()}
        self._asked: list[optuna.Trial] = []

    def propose(self, number: int) -> list[dict[str, Any]]:
        """Proposes so many settings; `tell` has to come before the next."""
        self._asked = [self._study.ask(self._space) for _ in range(number)]
        return [
            {
                field: json.loads(value) if _is_choice(self._space[field]) else _shorten(value)
                for field, value in trial.params.items()
            }
            for trial in self._asked
        ]

    def tell(self, losses: Sequence[float]) -> None:
        """Tells the loss of each proposal, in order; one that is not finite has failed."""
        for trial, loss in zip(self._asked, losses, strict=True):
            if math.isfinite(loss):
                self._study.tell(trial, loss)
            else:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _make_distribution(one: Range | Sequence[Any]) -> BaseDistribution:
    if isinstance(one, Range):
        return FloatDistribution(one.low, one.high, log=one.log)
    # Values may be lists or sections, which the sampler takes as text.
    return CategoricalDistribution([json.dumps(value) for value in one])


def _is_choice(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution)


def _shorten(value: float) -> float:
    """Three digits: a setting that can be said."""
    return float(f"{value:.3g}")
