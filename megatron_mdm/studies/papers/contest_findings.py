"""What runs of a contest came to: chosen on some held-out documents, judged on the others.

A run offers a loss at each validation, of its weights and of each average of them, and a network of
several objectives by each. Taking the least of many noisy losses looks too good. So the held-out
documents are divided: one half says which validation is taken, the other half what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.statistics import Interval, clustered_mean, student_interval
from megatron_mdm.diffusion.samples import LossKind
from megatron_mdm.reporting.judged_windows import (
    RAW_WEIGHTS,
    JudgedWindows,
    read_judged_windows,
)
from megatron_mdm.reporting.metrics import VALIDATIONS_FILE_NAME
from megatron_mdm.reporting.record_log import read_records

_KIND: LossKind = "nll_given_first"


class Way(NamedTuple):
    """How a run is judged.

    Attributes:
        weights: Raw, or the name of an average.
        judge: By which loss; None: the run's own.
    """

    weights: str
    judge: str | None

    def __str__(self) -> str:
        weights = "" if self.weights == RAW_WEIGHTS else f"average {self.weights}"
        judge = "" if self.judge is None else f"as {self.judge.upper()}"
        return ", ".join(filter(None, [weights, judge])) or "raw"


@dataclass(frozen=True)
class JudgedRun:
    """A run, its choice and its loss.

    Attributes:
        folder: Of the run.
        way: How it is judged.
        step: At which validation.
        chosen_loss: The loss on the documents by which the two were chosen, nats per token.
        losses_N: Losses of the windows of the other documents, float64 [N].
        document_N: int64 [N], document of each.
        curve: Loss on those documents by step, judged in this way.
    """

    folder: Path
    way: Way
    step: int
    chosen_loss: float
    losses_N: NDArray[np.float64]
    document_N: NDArray[np.int64]
    curve: Mapping[int, float]

    @property
    def loss(self) -> float:
        """Mean over the windows, nats per token."""
        return float(self.losses_N.mean())


def split_documents(document_N: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Divides held-out windows: which ones say what is taken.

    Args:
        document_N: int64 [N], document of each window.
        seed: Of the choice.

    Returns:
        Bool [N], True for about half of the documents; of one document, for every other window.
    """
    documents = np.unique(document_N)
    if len(documents) < 2:
        is_even_N: NDArray[np.bool_] = np.arange(len(document_N)) % 2 == 0
        return is_even_N
    shuffled = np.random.default_rng(seed).permutation(documents)
    return np.isin(document_N, shuffled[: len(documents) // 2])


def judge_run(folder: Path, seed: int, ways: Sequence[Way] | None = None) -> JudgedRun | None:
    """Chooses the best validation of a run, and judges it.

    Args:
        folder: Of the run.
        seed: Of `split_documents`.
        ways: Those that are considered; None: all that the run was judged in.

    Returns:
        The run; None where it has no finite loss yet.
    """
    found: list[tuple[float, Way, JudgedWindows]] = []
    curves: dict[Way, dict[int, float]] = {}
    for way in list_ways(folder) if ways is None else ways:
        curves[way] = {}
        for step, windows in read_judged_windows(folder, way.weights, way.judge).items():
            losses_N, mask_N = windows.get_losses(_KIND), split_documents(windows.document_N, seed)
            loss = float(losses_N[mask_N].mean())
            curves[way][step] = float(losses_N[~mask_N].mean())
            if math.isfinite(loss):
                found.append((loss, way, windows))
    if not found:
        return None
    loss, way, windows = min(found, key=lambda one: one[0])
    rest_N = ~split_documents(windows.document_N, seed)
    return JudgedRun(
        folder,
        way,
        windows.step,
        loss,
        windows.get_losses(_KIND)[rest_N],
        windows.document_N[rest_N],
        curves[way],
    )


def list_ways(folder: Path) -> list[Way]:
    """Lists how the validations of a run were judged."""
    path = folder / VALIDATIONS_FILE_NAME
    if not path.exists():
        return []
    records: Iterable[Mapping[str, Any]] = read_records(path)
    return list(
        dict.fromkeys(
            Way(record.get("weights", RAW_WEIGHTS), record.get("judge")) for record in records
        )
    )


class SeedSpread(NamedTuple):
    """How much losses differ between seeds, pooled over groups of runs.

    Attributes:
        deviation: Standard deviation, nats per token.
        degrees: Its degrees of freedom.
    """

    deviation: float
    degrees: int


def pool_seeds(groups: Iterable[Sequence[JudgedRun]]) -> SeedSpread:
    """Pools the spread of seeds: two of one group alone say next to nothing."""
    losses = [[run.loss for run in group] for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in losses)
    if not degrees:
        return SeedSpread(math.nan, 0)
    squares = sum(float(np.var(group)) * len(group) for group in losses)
    return SeedSpread(math.sqrt(squares / degrees), degrees)


class Measured(NamedTuple):
    """A loss, or a difference of two, over seeds and windows.

    Attributes:
        mean: Nats per token.
        interval: Over seeds and held-out documents; None where too few are known.
    """

    mean: float
    interval: Interval | None

    @property
    def is_open(self) -> bool:
        """Does the interval of a difference leave open which is better?"""
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]


def measure_loss(runs: Sequence[JudgedRun], spread: SeedSpread) -> Measured:
    """The mean loss of runs that differ in their seed.

    Args:
        runs: One a seed, judged on the same windows.
        spread: Of seeds.

    Returns:
        The mean with its interval.
    """
    values_N = np.mean([run.losses_N for run in runs], axis=0)
    return _measure(values_N, runs[0].document_N, spread.deviation, spread.degrees, len(runs))


def measure_difference(
    runs: Sequence[JudgedRun], others: Sequence[JudgedRun], spread: SeedSpread
) -> Measured:
    """How much higher the loss of other runs is, window by window.

    Args:
        runs: One a seed.
        others: The same number, judged on the same windows.
        spread: Of seeds; those of the two sides are taken to be independent.

    Returns:
        The mean with its interval: what makes some windows harder than others is not in it.
    """
    pairs = zip(runs, others, strict=True)
    values_N = np.mean([other.losses_N - run.losses_N for run, other in pairs], axis=0)
    deviation = spread.deviation * math.sqrt(2)
    return _measure(values_N, runs[0].document_N, deviation, spread.degrees, len(runs))


def _measure(
    values_N: NDArray[np.float64],
    document_N: NDArray[np.int64],
    deviation: float,
    degrees: int,
    num_seeds: int,
) -> Measured:
    mean, error, clustered = clustered_mean(values_N, document_N)
    over_windows = error if math.isnan(clustered) else clustered
    if not degrees or math.isnan(over_windows):
        return Measured(mean, None)
    total = math.hypot(over_windows, deviation / math.sqrt(num_seeds))
    num_documents = len(np.unique(document_N))
    return Measured(mean, student_interval(mean, total, min(degrees, max(num_documents - 1, 1))))
