"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from megatron_mdm.checkpoint.saving import save_checkpoint
from megatron_mdm.checkpoint.storage import FORMAT_VERSION, CheckpointManifest
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.reporting.console import format_training_line, format_validation_line
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.training.engine import Engine, StepResult
from megatron_mdm.training.optimizer import learning_rate
from megatron_mdm.training.plan import RunPlan
from megatron_mdm.training.recount import PredictionCounter, write_ledger
from megatron_mdm.training.throughput import Throughput
from megatron_mdm.training.validation import Validator

_VERSIONED = ("megatron_mdm", "torch", "deepspeed", "megatron-core", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on.

    Returns:
        Package names and versions.
    """
    from megatron_mdm import __version__

    return {name: __version__ if name == "megatron_mdm" else version(name) for name in _VERSIONED}


class Trainer:
    """Runs a plan's steps.

    Args:
        plan: The run.
        engine: This rank's engine.
        batches: This replica's batches.
        validator: Held-out loss, None without held-out shards.
        logger: Metrics; only on the first rank.
        first_step: Steps already taken.
        predictions: Tokens predicted in those steps, for each source.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        batches: TrainingBatches,
        validator: Validator | None,
        logger: MetricsLogger | None,
        first_step: int,
        predictions: Sequence[int],
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._engine = engine
        self._batches = batches
        self._validator = validator
        self._logger = logger
        self._step = first_step
        self._first_step = first_step
        self._predictions = PredictionCounter(engine.topology, predictions)
        self._throughput = Throughput(
            plan.config, plan.device, plan.dtype, engine.topology.world_size
        )
        self._started = time.perf_counter()

    def fit(self) -> None:
        """Trains to the end of the plan: step, log, validate, save."""
        config, last_step = self._config, self._plan.num_steps
        self._throughput.restart()
        threads = config.data.reader_threads
        for batches in self._batches.iterate(self._step, last_step, threads=threads):
            lr = learning_rate(self._step, last_step, config.optimizer, config.schedule)
            result = self._engine.train_step(self._step, batches, lr)
            self._step += 1
            self._predictions.add(batches)
            if self._is_due(config.reporting.log_every_steps):
                self._log(result, lr)
            with self._throughput.left_out():
                if self._is_due(config.validation.every_steps):
                    self._validate()
                if self._is_due(config.checkpoint.every_steps):
                    self._save()

    def _is_due(self, every_steps: int | None) -> bool:
        if self._step == self._plan.num_steps:
            return True
        return every_steps is not None and self._step % every_steps == 0

    def _log(self, result: StepResult, lr: float) -> None:
        loss_sum = result.loss_sum
        dist.all_reduce(loss_sum)
        every = self._config.reporting.log_every_steps
        steps = min(self._step - self._first_step, (self._step - 1) % every + 1)
        record = {
            **self._progress(),
            "train/loss_nats_per_token": loss_sum.item() / self._config.batch.global_batch_size,
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            **self._throughput.measure(steps),
        }
        if self._logger is not None:
            self._logger.log(record)
            elapsed = time.perf_counter() - self._started
            done = self._step - self._first_step
            eta_seconds = elapsed / done * (self._plan.num_steps - self._step)
            total = self._plan.num_steps
            self._print(format_training_line(record, total_steps=total, eta_seconds=eta_seconds))

    def _validate(self) -> None:
        if self._validator is None:
            return
        estimate = self._validator(self._engine)
        record = {
            **self._progress(),
            "valid/nll_nats_per_token": estimate.mean,
            "valid/nll_standard_error": estimate.standard_error,
            "valid/num_tokens": self._validator.num_tokens,
            "valid/noise_seed": self._config.validation.noise_seed,
        }
        if self._logger is not None:
            self._logger.log(record)
            self._print(format_validation_line(record))

    def _save(self) -> None:
        predictions = self._predictions.totals()
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            step=self._step,
            consumed_samples=self._step * self._config.batch.global_batch_size,
            world_size=self._engine.topology.world_size,
            config=self._config.model_dump(mode="json"),
            versions=library_versions(),
            data_fingerprint=self._plan.data.fingerprint,
            predictions=predictions,
            files={},
        )
        path = save_checkpoint(
            self._plan.checkpoint_dir,
            manifest,
            shards=self._engine.shards,
            states=self._engine.states,
            topology=self._engine.topology,
        )
        if self._logger is not None:
            self._print(f"saved {path}")
            write_ledger(self._plan, self._step, predictions)

    def _progress(self) -> dict[str, Any]:
        samples = self._step * self._config.batch.global_batch_size
        return {
            "step": self._step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self._config.data.seq_length,
            "epoch": samples / self._plan.data.train.num_windows,
        }

    @staticmethod
    def _print(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - the console line is what a user watches
