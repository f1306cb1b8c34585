"""The training loop."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import (
    FORMAT_VERSION,
    CheckpointManifest,
    checkpoint_name,
)
from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.data.loader import Batch, TrainingBatches
from megatron_mdm.diffusion.objectives import objective_of
from megatron_mdm.model.accounting import six_nd_flops
from megatron_mdm.reporting.console import format_training_line, format_validation_line
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.reporting.printing import Printer
from megatron_mdm.reporting.remarks import going_on_without
from megatron_mdm.reporting.validation_history import ValidationHistory
from megatron_mdm.training.engine import Engine, StepResult
from megatron_mdm.training.environment import library_versions
from megatron_mdm.training.epochs import EpochLoss, Epochs, exact_fraction
from megatron_mdm.training.guard import StepGuard
from megatron_mdm.training.optimizer import learning_rate
from megatron_mdm.training.plan import RunPlan
from megatron_mdm.training.recount import LEDGER_FILE_NAME, PredictionCounter, write_ledger
from megatron_mdm.training.restarts import STOPPED_FILE_NAME
from megatron_mdm.training.signals import StopRequests
from megatron_mdm.training.throughput import Throughput
from megatron_mdm.training.validation import Validation
from megatron_mdm.training.watchdog import Watchdog


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it started or was saved.

    Attributes:
        step: Optimizer steps taken.
        predictions: Tokens predicted in those steps, for each source.
        num_skipped: Steps among them whose update was left out.
        loss_average: Moving average of the loss, for the guard against spikes.
    """

    step: int
    predictions: list[int]
    num_skipped: int = 0
    loss_average: float | None = None


class _PartEnded(Exception):
    """A validation that all ranks leave at the same place."""

    def __init__(self, stopped_by: signal.Signals | None, reason: str | None) -> None:
        super().__init__(reason)
        self.stopped_by = stopped_by
        self.reason = reason


class Trainer:
    """Runs a plan's steps.

    Args:
        plan: The run.
        engine: This rank's engine.
        batches: This replica's batches.
        validation: Held-out loss, and what it is compared with.
        logger: Metrics; only on the first rank.
        printer: The lines that a user watches; only on the first rank.
        progress: Where the run stands.
        stops: Requests to stop.
        watchdog: Is told of every step.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        batches: TrainingBatches,
        validation: Validation,
        logger: MetricsLogger | None,
        printer: Printer | None,
        progress: Progress,
        stops: StopRequests,
        watchdog: Watchdog,
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._engine = engine
        self._batches = batches
        self._validation = validation
        self._logger = logger
        self._printer = printer
        self._stops = stops
        self._watchdog = watchdog
        self._step = progress.step
        self._first_step = progress.step
        self._guard = StepGuard(
            plan.config.faults,
            progress.step - progress.num_skipped,
            progress.num_skipped,
            progress.loss_average,
        )
        self._predictions = PredictionCounter(engine.topology, progress.predictions)
        self._epochs = Epochs(plan.data.train.num_windows, plan.config.batch.global_batch_size)
        self._epoch_loss = EpochLoss(self._epochs, progress.step, engine.topology.device)
        length = objective_of(plan.config).mean_length(plan.config.data.seq_length)
        self._flops_per_sample = six_nd_flops(plan.config.model, length)
        self._validation_failure: str | None = None
        # What a resumed run has measured before stands in its files, cut to the steps it keeps.
        self._history = None if logger is None else ValidationHistory(plan.run_dir)
        self._throughput = Throughput(
            plan.config,
            plan.device,
            plan.dtype,
            engine.topology.world_size,
            plan.data.head_share,
        )
        self._started = time.perf_counter()
        self._writer = CheckpointWriter(
            plan.checkpoint_dir, plan.config.checkpoint, engine.topology
        )

    def fit(self) -> signal.Signals | None:
        """Trains to the end of the plan: step, log, validate, save.

        Returns:
            The signal that asked for an earlier end, after saving; None at the end of the plan.

        Raises:
            BadStepsError: Too many steps in a row had to be skipped.
            DataError: A damaged shard was met; only on the ranks that met it. Or the last
                validation could not be made; after saving, on all ranks.
            CheckpointError: A checkpoint could not be written.
        """
        # Leaving it waits for a save in the background, also when training fails.
        with self._writer:
            return self._run()

    def _run(self) -> signal.Signals | None:
        config, last_step = self._config, self._plan.num_steps
        self._throughput.restart()
        threads = config.data.reader_threads
        self._mark("reading")
        for batches in self._batches.iterate(self._step, last_step, threads=threads):
            self._train_step(batches)
            with self._throughput.left_out():
                # Before the validation, which must not cost what was trained.
                saved = self._save() if self._is_due(config.checkpoint.every_steps) else None
                stopped_by = self._validate() if self._is_validation_due() else None
                if self._step < last_step:
                    stopped_by = stopped_by or self._stops.poll()
                if stopped_by:
                    self._stop(stopped_by, saved or self._save())
                    return stopped_by
            self._mark("reading")
        self._writer.wait()
        if self._validation_failure is not None:
            raise DataError(self._validation_failure)
        return None

    def _train_step(self, batches: list[Batch]) -> None:
        self._mark("training")
        lr = learning_rate(
            self._step, self._plan.num_steps, self._config.optimizer, self._config.schedule
        )
        losses: list[float] = []

        def accepts(loss_sum: Tensor) -> bool:
            losses.append(self._mean_loss(loss_sum))
            return self._guard.accepts(losses[0])

        needs_loss = self._guard.needs_loss
        result = self._engine.train_step(self._step, batches, lr, accepts if needs_loss else None)
        self._step += 1
        self._predictions.add(batches)
        self._epoch_loss.add(self._step, result.loss_sum, result.is_applied)
        is_logged = self._is_due(self._config.reporting.log_every_steps)
        # Skipped on all ranks or on none, so all of them take part in the sum.
        if not losses and (is_logged or not result.is_applied):
            losses.append(self._mean_loss(result.loss_sum))
        loss = losses[0] if losses else None
        reason = ""
        if not result.is_applied and loss is not None:
            reason = self._guard.reason(loss, result.grad_norm)
        self._guard.count(result.is_applied, loss)
        if is_logged and loss is not None:
            self._log(result, loss, lr)
        if reason:
            if self._logger is not None:
                total = self._plan.num_steps
                self._say(f"step {self._step:>4}/{total} | skipped ({reason})")
            self._guard.check(self._step, reason)

    def _mean_loss(self, loss_sum: Tensor) -> float:
        total = loss_sum.clone()
        dist.all_reduce(total)
        return total.item() / self._config.batch.global_batch_size

    def _stop(self, stopped_by: signal.Signals, saved: Path) -> None:
        self._writer.wait()
        if self._logger is None:
            return
        record = {"step": self._step, "signal": stopped_by.name, "time": time.time()}
        path = self._plan.run_dir / STOPPED_FILE_NAME
        with going_on_without(path):
            write_text_whole(path, json.dumps(record) + "\n")
        # It may be missing where checkpoint.on_write_error is continue.
        outcome = f"saved {saved}" if saved.exists() else "this step could not be saved"
        self._say(
            f"stopped by {stopped_by.name} at step {self._step}: {outcome}; start the same command "
            "again to go on"
        )

    def _mark(self, place: str) -> None:
        self._watchdog.mark(self._step, place)

    def _is_due(self, every_steps: int | None) -> bool:
        if self._step == self._plan.num_steps:
            return True
        return every_steps is not None and self._step % every_steps == 0

    def _is_validation_due(self) -> bool:
        settings = self._config.validation
        if settings.every_epochs is None or self._step == self._plan.num_steps:
            return self._is_due(settings.every_steps)
        return self._epochs.ends_with(self._step, exact_fraction(settings.every_epochs))

    def _log(self, result: StepResult, loss: float, lr: float) -> None:
        every = self._config.reporting.log_every_steps
        steps = min(self._step - self._first_step, (self._step - 1) % every + 1)
        record = {
            **self._progress(),
            "train/loss_nats_per_token": loss,
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": self._guard.num_skipped,
            "train/lr": lr,
            **self._throughput.measure(steps),
        }
        for report in self._writer.take_reports():
            record |= {
                "perf/checkpoint_stall_seconds": report.stall_seconds,
                "perf/checkpoint_write_seconds": report.write_seconds,
                "perf/checkpoint_bytes": report.num_bytes,
            }
        if self._logger is not None:
            self._logger.log(record)
            elapsed = time.perf_counter() - self._started
            done = self._step - self._first_step
            eta_seconds = elapsed / done * (self._plan.num_steps - self._step)
            total = self._plan.num_steps
            self._say(format_training_line(record, total_steps=total, eta_seconds=eta_seconds))

    def _validate(self) -> signal.Signals | None:
        """Validates, unless a signal is heard or a rank cannot read; returns the signal."""
        if self._validation.is_empty:
            return None
        self._validation_failure = None
        try:
            found, judged = self._validation(self._engine, self._report_validating)
        except _PartEnded as ended:
            if ended.stopped_by is not None:
                return ended.stopped_by
            reason = self._stops.gather_reason(ended.reason)
            self._validation_failure = f"validation at step {self._step} was left out: {reason}"
            if self._logger is not None:
                self._say(self._validation_failure)
            return None
        self._log_validation({**self._progress(), **found}, judged)
        return None

    def _report_validating(self, failure: DataError | None) -> None:
        self._mark("validating")
        found = self._stops.poll_in_part(failure is not None)
        if found:
            stopped_by = None if found is True else found
            raise _PartEnded(stopped_by, None if failure is None else str(failure))

    def _log_validation(self, record: dict[str, Any], judged: JudgedWindows | None) -> None:
        epoch_loss = self._epoch_loss.mean(self._step)
        if epoch_loss is not None:
            record["train/epoch_loss_nats_per_token"] = epoch_loss
        if self._logger is None or self._history is None:
            return
        if judged is not None:
            self._logger.log_windows(replace(judged, step=self._step).as_record())
        record |= self._history.add(record, judged)
        self._logger.log(record)
        self._say(format_validation_line(record))

    def _save(self) -> Path:
        self._mark("saving")
        predictions = self._predictions.totals()
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            step=self._step,
            consumed_samples=self._step * self._config.batch.global_batch_size,
            config=self._config.model_dump(mode="json"),
            versions=library_versions(),
            environment=self._plan.environment,
            data_fingerprint=self._plan.data.fingerprint,
            tokenizer=self._plan.data.tokenizer,
            predictions=predictions,
            skipped_steps=self._guard.num_skipped,
            loss_average=self._guard.loss_average,
        )

        def on_published(path: Path) -> None:
            with going_on_without(self._plan.run_dir / LEDGER_FILE_NAME):
                write_ledger(self._plan, manifest.step, predictions)
            self._say(f"saved {path}")

        self._writer.save(
            manifest,
            shards=self._engine.shards,
            states=self._engine.states,
            on_published=on_published,
        )
        return self._plan.checkpoint_dir / checkpoint_name(manifest.step)

    def _progress(self) -> dict[str, Any]:
        samples = self._step * self._config.batch.global_batch_size
        return {
            "step": self._step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self._config.data.seq_length,
            "consumed_flops_6nd": samples * self._flops_per_sample,
            "epoch": samples / self._plan.data.train.num_windows,
        }

    def _say(self, line: str) -> None:
        if self._printer is not None:
            self._printer.say(line)
