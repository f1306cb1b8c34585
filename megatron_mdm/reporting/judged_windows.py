"""The loss of each window in a validation, and differences between validations, window by window.

Two losses of the same windows have in common what makes some windows harder than others, and the
noise if it is the same. So the error of their difference comes from the windows' differences, and
is far smaller than both errors combined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import ClusteredEstimate, clustered_mean
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.diffusion.samples import LossKind
from megatron_mdm.reporting.metrics import VALIDATIONS_FILE_NAME
from megatron_mdm.reporting.record_log import read_records

RAW_WEIGHTS = "raw"
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class JudgedWindows:
    """The losses of the windows of one validation.

    Attributes:
        step: Optimizer step.
        windows: Identifies the windows by content.
        document_N: int64 [N], number of the document that each is of.
        noise_seed: Of the noise bank; None: no noise (AR).
        draws_per_sample: Draws of noise a window; 1 without noise.
        nll_N: float64 [N], nats per token over all that is predicted.
        nll_given_first_N: float64 [N], over what AR predicts too: each text's first token is given.
        weights: `raw`, or the name of the average of the weights that was judged.
        judge: Of a run of several losses, which one beside its own; None: its own.
    """

    step: int
    windows: str
    document_N: NDArray[np.int64]
    noise_seed: int | None
    draws_per_sample: int
    nll_N: FloatArray
    nll_given_first_N: FloatArray
    weights: str = RAW_WEIGHTS
    judge: str | None = None

    def get_losses(self, kind: LossKind) -> FloatArray:
        """Losses of the windows, float64 [N]."""
        return self.nll_N if kind == "nll" else self.nll_given_first_N

    def mean(self, kind: LossKind) -> ClusteredEstimate:
        """The held-out loss with its errors."""
        return clustered_mean(self.get_losses(kind), self.document_N, self.get_times())

    def get_times(self) -> FloatArray | None:
        """The draws' times, float64 [N, K]; None without noise."""
        if self.noise_seed is None:
            return None
        return NoiseBank(len(self.nll_N), self.draws_per_sample, self.noise_seed).times_NK

    def as_record(self) -> dict[str, Any]:
        """A record that `read_judged_windows` reads."""
        which = {} if self.weights == RAW_WEIGHTS else {"weights": self.weights}
        which |= {} if self.judge is None else {"judge": self.judge}
        return {
            "step": self.step,
            **which,
            "windows": self.windows,
            "noise_seed": self.noise_seed,
            "draws_per_sample": self.draws_per_sample,
            "documents": self.document_N.tolist(),
            "nll_nats_per_token": self.nll_N.tolist(),
            "nll_given_first_nats_per_token": self.nll_given_first_N.tolist(),
        }


def read_judged_windows(
    run_dir: Path, weights: str = RAW_WEIGHTS, judge: str | None = None
) -> dict[int, JudgedWindows]:
    """Reads the losses of the windows of a run's validations.

    Args:
        run_dir: Directory of the run.
        weights: Of which weights: `raw`, or the name of an average.
        judge: By which loss beside the run's own; None: that.

    Returns:
        By step; empty where a run was made before this was kept.

    Raises:
        DataError: The file is damaged.
    """
    path = run_dir / VALIDATIONS_FILE_NAME
    if not path.exists():
        return {}
    return {
        record["step"]: _from_record(path, record)
        for record in read_records(path)
        if record.get("weights", RAW_WEIGHTS) == weights and record.get("judge") == judge
    }


def paired_difference(
    one: JudgedWindows, other: JudgedWindows, kind: LossKind = "nll_given_first"
) -> ClusteredEstimate | None:
    """How much higher the other's loss is, window by window.

    Args:
        one: A validation.
        other: Another one, of the same run or not; one may be of AR and one of MDM.
        kind: Which loss.

    Returns:
        The mean difference; None if they judged different windows. Where both have noise and it is
        not the same, the error is larger and stays right.
    """
    if one.windows != other.windows or len(one.nll_N) != len(other.nll_N):
        return None
    return mean_difference([(one, other)], kind)


def mean_difference(
    pairs: list[tuple[JudgedWindows, JudgedWindows]], kind: LossKind = "nll_given_first"
) -> ClusteredEstimate:
    """The mean over pairs, such as seeds, of how much higher the second's loss is.

    Args:
        pairs: At least one; all judged the same windows.
        kind: Which loss.

    Returns:
        The mean difference. Its errors are over windows alone.
    """
    difference_N = np.mean([b.get_losses(kind) - a.get_losses(kind) for a, b in pairs], axis=0)
    noises = {
        (judged.noise_seed, judged.draws_per_sample)
        for pair in pairs
        for judged in pair
        if judged.noise_seed is not None
    }
    noisy = next(
        (judged for pair in pairs for judged in pair if judged.noise_seed is not None), None
    )
    times_NK = noisy.get_times() if noisy is not None and len(noises) == 1 else None
    return clustered_mean(difference_N, pairs[0][0].document_N, times_NK)


def _from_record(path: Path, record: Mapping[str, Any]) -> JudgedWindows:
    try:
        found = JudgedWindows(
            step=int(record["step"]),
            windows=str(record["windows"]),
            document_N=np.array(record["documents"], dtype=np.int64),
            noise_seed=record["noise_seed"],
            draws_per_sample=int(record["draws_per_sample"]),
            nll_N=np.array(record["nll_nats_per_token"], dtype=np.float64),
            nll_given_first_N=np.array(record["nll_given_first_nats_per_token"], dtype=np.float64),
            weights=str(record.get("weights", RAW_WEIGHTS)),
            judge=record.get("judge"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged at step {record['step']} ({error}): move it away; the run's curve "
            "in metrics.jsonl does not need it."
        ) from error
    if not len(found.document_N) == len(found.nll_N) == len(found.nll_given_first_N):
        raise DataError(
            f"{path} is damaged at step {record['step']} (lists of different lengths): move it "
            "away; the run's curve in metrics.jsonl does not need it."
        )
    return found
