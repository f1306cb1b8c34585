"""AR against masked diffusion on little data: the best of each, and where their curves cross.

Runs are grouped twice. A condition is what both objectives have to cope with: the corpus and its
tokenizer, U unique tokens, and N parameters unless each objective may have its best size. Within
it, the runs of an objective that differ in nothing but their seed are one setting, and the best
setting is the one whose best held-out losses are least on average. Losses are nats per token over
the tokens that both objectives predict; for a bound (MDM) as for a likelihood (AR).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import curve_fit

from megatron_mdm.config import ModelSize, ParameterConvention
from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import (
    ClusteredEstimate,
    Interval,
    degrees_of_sum,
    student_interval,
)
from megatron_mdm.reporting.judged_windows import JudgedWindows, mean_difference
from megatron_mdm.studies.laws.critical import CriticalCompute, LossCurve, critical_flops_of_curves

# A curve that levels off has a limit, a rate and an exponent; fewer points do not tell them apart.
_FEWEST_POINTS = 6


class Condition(NamedTuple):
    """What both objectives have to cope with.

    Attributes:
        corpus: Name of the shards, which say the tokenizer too.
        unique_tokens: U.
        num_parameters: N, without embeddings; None: the best size of each objective.
    """

    corpus: str
    unique_tokens: int
    num_parameters: int | None

    @property
    def size(self) -> str:
        """N in words."""
        if self.num_parameters is None:
            return "the best size of each"
        return f"{self.num_parameters:,} parameters"

    @property
    def amounts(self) -> str:
        """U and N in words."""
        return f"{self.unique_tokens:,} unique tokens, {self.size}"


class MeasuredRun(NamedTuple):
    """A run and its held-out losses.

    Attributes:
        name: Of the run.
        objective: AR or MDM.
        condition: Corpus and size.
        setting: What else was chosen, such as `optimizer.lr=0.002`; the same for all seeds.
        seed: Of the run.
        epochs: Where it was judged, ascending, float64 [K].
        flops: 6 N D there, N without embeddings, float64 [K].
        losses: Held-out losses, nats per token, float64 [K].
        errors: Their standard errors, float64 [K].
        records: All that was logged.
        best_windows: What each held-out window cost where the loss is least; None where a run was
            made before this was kept.
        size: N both ways.
    """

    name: str
    objective: ObjectiveKind
    condition: Condition
    setting: str
    seed: int
    epochs: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    records: Sequence[Mapping[str, Any]]
    best_windows: JudgedWindows | None
    size: ModelSize

    @property
    def best(self) -> int:
        """Where the held-out loss is least."""
        return int(self.losses.argmin())


@dataclass(frozen=True)
class BestSetting:
    """The best setting of an objective under a condition.

    Attributes:
        setting: Which one.
        runs: Its runs, one per seed.
        loss: Mean over seeds of the least held-out loss.
        interval: With `CONFIDENCE`; None if no condition has two seeds. It covers the seeds and not
            the choice of the held-out windows, which all runs share.
        num_settings: How many settings were compared.
    """

    setting: str
    runs: tuple[MeasuredRun, ...]
    loss: float
    interval: Interval | None
    num_settings: int


class LossLimit(NamedTuple):
    """Where a curve of best losses tends to, from a fit of E + K C^-gamma.

    Attributes:
        loss: E, nats per token.
        error: Its standard error, from how the curve scatters around the fit.
        crossing_flops: Where the fit reaches the other objective's best; None: never.
    """

    loss: float
    error: float
    crossing_flops: float | None

    def excludes(self, loss: float) -> bool:
        """Is a loss farther from E than two standard errors?"""
        return abs(self.loss - loss) > 2 * self.error


@dataclass(frozen=True)
class Comparison:
    """Both objectives under one condition.

    Attributes:
        condition: Which.
        ar: Best AR setting.
        mdm: Best MDM setting.
        gap: MDM's best less AR's; negative: MDM is ahead.
        interval: Of the gap, over seeds; None if not known.
        window_gap: The gap of runs with the same seed, with its errors over held-out windows; None
            where they judged different windows, or it is not known which.
        critical: Where the curves of best losses cross, over seeds; N without embeddings.
        critical_with_embeddings: The same with N counted as the published critical compute counts
            it. Where the objectives have sizes of their own it is no multiple of the other.
        limits: Where each MDM curve tends to; empty where none can be fitted.
    """

    condition: Condition
    ar: BestSetting
    mdm: BestSetting
    gap: float
    interval: Interval | None
    window_gap: ClusteredEstimate | None
    critical: CriticalCompute
    critical_with_embeddings: CriticalCompute
    limits: tuple[LossLimit, ...]


def compare(runs: Sequence[MeasuredRun]) -> list[Comparison]:
    """Compares the objectives under every condition that both were run under.

    Args:
        runs: Runs with at least one held-out loss.

    Returns:
        Comparisons by corpus, N and U.

    Raises:
        DataError: No condition has runs of both objectives.
    """
    spread = {
        kind: pool_seed_spread(run for run in runs if run.objective == kind) for kind in _KINDS
    }
    comparisons = []
    for condition in sorted({run.condition for run in runs}, key=_place):
        found = {kind: _best(runs, condition, kind, spread[kind]) for kind in _KINDS}
        ar, mdm = found["ar"], found["mdm"]
        if ar is None or mdm is None:
            continue
        comparisons.append(_compare(condition, ar, mdm, spread))
    if not comparisons:
        raise DataError(
            "No condition (corpus, unique tokens, parameters) has runs of both AR and MDM: train "
            "the other objective under the same one."
        )
    return comparisons


class SeedSpread(NamedTuple):
    """How much best losses differ between seeds.

    Attributes:
        deviation: Standard deviation, pooled over all settings; nats per token.
        degrees: Its degrees of freedom.
    """

    deviation: float
    degrees: int

    def interval(self, mean: float, num_seeds: int) -> Interval | None:
        """Where a mean over so many seeds lies; None where no setting has two."""
        if not self.degrees:
            return None
        return student_interval(mean, self.deviation / math.sqrt(num_seeds), self.degrees)


def pool_seed_spread(runs: Iterable[MeasuredRun]) -> SeedSpread:
    """Pools the spread of seeds over settings: two seeds of one alone say next to nothing.

    Args:
        runs: Runs of one objective.

    Returns:
        The spread, taken to be the same for all settings.
    """
    groups: dict[tuple[Condition, str], list[float]] = {}
    for run in runs:
        groups.setdefault((run.condition, run.setting), []).append(float(run.losses[run.best]))
    squares = sum(float(np.var(losses)) * len(losses) for losses in groups.values())
    degrees = sum(len(losses) - 1 for losses in groups.values())
    return SeedSpread(math.sqrt(squares / degrees) if degrees else math.nan, degrees)


def accumulate_best(
    run: MeasuredRun, parameters: ParameterConvention = "without_embeddings"
) -> LossCurve:
    """What had been reached with so much compute, for a run that keeps its best checkpoint.

    Args:
        run: The run.
        parameters: Which N its FLOPs shall count.

    Returns:
        The curve.
    """
    flops = [
        run.size.convert_flops(spent, "without_embeddings", parameters)
        for spent in run.flops.tolist()
    ]
    return LossCurve(flops, np.minimum.accumulate(run.losses).tolist())


def fit_limit(run: MeasuredRun, target: float) -> LossLimit | None:
    """Fits where a run's curve of best losses tends to.

    Args:
        run: The run.
        target: The loss that it may or may not come to.

    Returns:
        The limit; None where the curve has too few points or does not bend that way.
    """
    flops, losses = (np.array(values) for values in accumulate_best(run))
    # The first third, in epochs on a log scale, is another regime.
    late = np.log(flops) >= np.log(flops[0]) + np.log(flops[-1] / flops[0]) / 3
    flops, losses = flops[late], losses[late]
    if len(flops) < _FEWEST_POINTS:
        return None
    relative = flops / flops[-1]

    def curve(x: np.ndarray, limit: float, scale: float, gamma: float) -> np.ndarray:
        return limit + scale * x**-gamma

    start = (float(losses[-1]) * 0.9, float(losses[-1]) * 0.1, 0.5)
    try:
        (limit, scale, gamma), covariance = curve_fit(
            curve, relative, losses, p0=start, bounds=((0, 0, 0.01), np.inf), maxfev=10_000
        )
    except RuntimeError:
        # It did not converge: the curve does not say where it goes.
        return None
    error = math.sqrt(covariance[0, 0])
    if limit >= target:
        return LossLimit(float(limit), error, None)
    reached = float(flops[-1]) * (scale / (target - limit)) ** (1 / gamma)
    return LossLimit(float(limit), error, max(reached, float(flops[0])))


_KINDS: tuple[ObjectiveKind, ...] = ("ar", "mdm")


def _place(condition: Condition) -> tuple[str, int, int]:
    return condition.corpus, condition.num_parameters or 0, condition.unique_tokens


def _best(
    runs: Sequence[MeasuredRun], condition: Condition, kind: ObjectiveKind, spread: SeedSpread
) -> BestSetting | None:
    settings: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        if run.condition == condition and run.objective == kind:
            settings.setdefault(run.setting, []).append(run)
    if not settings:
        return None
    means = {
        setting: float(np.mean([run.losses[run.best] for run in found]))
        for setting, found in settings.items()
    }
    setting = min(means, key=means.__getitem__)
    found = tuple(sorted(settings[setting], key=lambda run: run.seed))
    interval = spread.interval(means[setting], len(found))
    return BestSetting(setting, found, means[setting], interval, len(settings))


def _compare(
    condition: Condition,
    ar: BestSetting,
    mdm: BestSetting,
    spread: Mapping[ObjectiveKind, SeedSpread],
) -> Comparison:
    gap = mdm.loss - ar.loss
    interval = None
    if ar.interval is not None and mdm.interval is not None:
        sides = ((spread["ar"], ar), (spread["mdm"], mdm))
        errors = [one.deviation / math.sqrt(len(best.runs)) for one, best in sides]
        degrees = degrees_of_sum(errors, [one.degrees for one, _ in sides])
        interval = student_interval(gap, math.hypot(*errors), degrees)
    pairs = [(one, other) for one in ar.runs for other in mdm.runs if one.seed == other.seed]
    if not pairs:
        raise DataError(
            f"{condition.corpus}: the best AR and the best MDM setting share no seed: train both "
            "with the same seeds."
        )
    limits = (fit_limit(run, ar.loss) for run in mdm.runs)
    return Comparison(
        condition,
        ar,
        mdm,
        gap,
        interval,
        _window_gap(pairs),
        _cross(pairs, "without_embeddings"),
        _cross(pairs, "with_embeddings"),
        tuple(limit for limit in limits if limit is not None),
    )


_Pairs = Sequence[tuple[MeasuredRun, MeasuredRun]]


def _cross(pairs: _Pairs, counted: ParameterConvention) -> CriticalCompute:
    return critical_flops_of_curves(
        [(accumulate_best(one, counted), accumulate_best(other, counted)) for one, other in pairs]
    )


def _window_gap(pairs: _Pairs) -> ClusteredEstimate | None:
    judged = [
        (one.best_windows, other.best_windows)
        for one, other in pairs
        if one.best_windows is not None and other.best_windows is not None
    ]
    if len(judged) < len(pairs) or len({each.windows for pair in judged for each in pair}) > 1:
        return None
    return mean_difference(judged)
