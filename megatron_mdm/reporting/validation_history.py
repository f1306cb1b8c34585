"""A run's validations so far: which is the best, and how the newest differs from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mdm.reporting.judged_windows import (
    JudgedWindows,
    paired_difference,
    read_judged_windows,
)
from megatron_mdm.reporting.metrics import (
    METRICS_FILE_NAME,
    NLL,
    MetricValue,
    find_best_validation,
    read_validations,
)


class ValidationHistory:
    """Sets each validation beside the best one before it, window by window.

    Args:
        run_dir: Of a run that goes on, whose files are cut to the steps that it keeps; None: no run
            was validated before.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self._records: list[Mapping[str, Any]] = []
        self._best: JudgedWindows | None = None
        if run_dir is not None and (run_dir / METRICS_FILE_NAME).exists():
            self._records += read_validations(run_dir / METRICS_FILE_NAME)
            best = find_best_validation(self._records)
            if best is not None:
                self._best = read_judged_windows(run_dir).get(best["step"])

    def add(
        self, record: Mapping[str, MetricValue], judged: JudgedWindows | None
    ) -> dict[str, int | float]:
        """Takes the newest validation.

        Args:
            record: Its metrics, with `step`.
            judged: Its held-out windows; None if there are none.

        Returns:
            The best loss so far and its step, and the difference from the best before: of the loss
            over all that is predicted, with the errors of a paired difference.
        """
        before, step = self._best, int(record["step"])
        self._records.append(record)
        best = find_best_validation(self._records)
        if best is None:
            return {}
        found: dict[str, int | float] = {
            "valid/best_nll_nats_per_token": best[NLL],
            "valid/best_step": best["step"],
        }
        if judged is None:
            return found
        judged = replace(judged, step=step)
        if best["step"] == step:
            self._best = judged
        change = None if before is None else paired_difference(before, judged, "nll")
        if before is not None and change is not None and math.isfinite(change.mean):
            found |= {
                "valid/change_since_step": before.step,
                "valid/change_nats_per_token": change.mean,
                "valid/change_standard_error": change.standard_error,
                "valid/change_clustered_error": change.clustered_error,
            }
        return {
            name: value
            for name, value in found.items()
            if not name.endswith("_error") or math.isfinite(value)
        }
