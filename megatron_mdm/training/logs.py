"""The log of a run: metrics in files and sinks, lines on the console."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mdm.reporting.console import format_training_line, format_validation_line
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.reporting.validation_history import ValidationHistory
from megatron_mdm.training.hooks import Hook, TrainingRun

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan


class Log(Hook):
    """Logs steps and validations, each with what the hooks before this one have measured."""

    name = "log"

    def __init__(self, plan: RunPlan, logger: MetricsLogger | None) -> None:
        self._logger = logger
        # What a resumed run has measured before stands in its files, cut to the steps it keeps.
        self._history = None if logger is None else ValidationHistory(plan.run_dir)
        self._started = time.perf_counter()

    def after_step(self, run: TrainingRun) -> None:
        """Logs what hooks have measured by themselves, and the step if it is due."""
        if self._logger is not None:
            for record in run.records:
                self._logger.log(record)
        run.records.clear()
        if not run.is_logged:
            return
        assert run.result is not None
        record = {
            **run.measure_progress(),
            "train/loss_nats_per_token": run.mean_loss(),
            "train/grad_norm": run.result.grad_norm,
            "train/skipped_steps": run.num_skipped,
            "train/lr": run.lr,
            **run.metrics,
        }
        run.metrics.clear()
        if self._logger is None:
            return
        self._logger.log(record)
        num_steps = run.plan.num_steps
        step_seconds = (time.perf_counter() - self._started) / (run.step - run.plan.first_step)
        eta_seconds = step_seconds * (num_steps - run.step)
        run.say(format_training_line(record, total_steps=num_steps, eta_seconds=eta_seconds))

    def after_validation(
        self, run: TrainingRun, record: dict[str, Any], judged: JudgedWindows | None
    ) -> None:
        """Logs the validation, beside the best one before it."""
        if self._logger is None or self._history is None:
            return
        if judged is not None:
            self._logger.log_windows(replace(judged, step=run.step).as_record())
            for one in run.judged_further:
                self._logger.log_windows(replace(one, step=run.step).as_record())
            for name, average in run.judged_averages.items():
                named = replace(average, step=run.step, weights=name)
                self._logger.log_windows(named.as_record())
        record |= self._history.add(record, judged)
        self._logger.log(record)
        run.say(format_validation_line(record))

    def close(self) -> None:
        """Closes files and sinks."""
        if self._logger is not None:
            self._logger.close()
