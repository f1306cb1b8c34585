"""Hooks of the training loop: what takes part in a run besides the step itself.

A hook has a method for every moment of the loop. `hook_list.py` names the hooks of a run in the one
order in which they are called, on every rank alike: it is the order of their collectives too.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.hook_states import WeightState
from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.accounting import six_nd_flops
from megatron_mdm.reporting.judged_windows import JudgedWindows

if TYPE_CHECKING:
    from megatron_mdm.reporting.printing import Printer
    from megatron_mdm.training.engine import Engine, StepResult
    from megatron_mdm.training.plan import RunPlan
    from megatron_mdm.training.watchdog import Watchdog


class Hook:
    """Base of all hooks: does nothing at any moment.

    Every rank has every hook and calls it at the same moments, so a hook may call collectives as
    long as whether it does so is the same on every rank.

    Attributes:
        name: Under which a checkpoint keeps the hook's state, one of a kind in a run; the class's
            name unless it says otherwise.
    """

    name = ""

    def __init_subclass__(cls) -> None:
        """Names the class."""
        cls.name = cls.__dict__.get("name") or cls.__name__

    def check_plan(self, plan: RunPlan) -> None:
        """Called on each rank by itself once the run is planned, before anything starts.

        Args:
            plan: The run; what only the first rank finds out is only in its plan.

        Raises:
            MdmError: The hook does not fit the run.
        """

    def begin(self, run: TrainingRun) -> None:
        """Called once when the engine stands, before `load_state_dict` and the first step."""

    def before_step(self, run: TrainingRun) -> None:
        """Called when the batches of a step are there."""

    def accepts_update(self, run: TrainingRun) -> bool:
        """Asked after the backward pass, when `run.mean_loss()` is known.

        Returns:
            False, on every rank, to leave the update out.
        """
        return True

    def after_step(self, run: TrainingRun) -> None:
        """Called after a step; what is put into `run.metrics` is logged with it."""

    def after_validation(
        self, run: TrainingRun, record: dict[str, Any], judged: JudgedWindows | None
    ) -> None:
        """Called after a validation, the same on every rank.

        Args:
            run: The run.
            record: Metrics, to which a hook may add.
            judged: Losses of the held-out windows, if there are any.
        """

    def before_save(self, run: TrainingRun) -> None:
        """Called on every rank before `state_dict`: gather here what other ranks hold."""

    def after_save(self, step: int, path: Path) -> None:
        """Called on the first rank alone once a checkpoint stands, perhaps from another thread.

        Args:
            step: Steps taken when it was begun.
            path: Its folder.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can hold it; that of the first rank is written."""
        return {}

    def weight_states(self) -> Mapping[str, WeightState]:
        """What a checkpoint keeps of every weight, float32 tensors in the weights' shapes.

        They are saved under each parameter's name and go on under any other layout.

        Returns:
            By name, of those that `list_weight_states` of the section names those that hold
            something; the same on every rank. After `load_state_dict` its tensors are filled with
            what the checkpoint kept.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what a checkpoint kept, the same on every rank, before the first step."""

    def close(self) -> None:
        """Called at the end of the run, also where it fails; without collectives."""


def read_state(hook: Hook, called: str) -> dict[str, Any]:
    """Asks a hook for its state.

    Args:
        hook: The hook.
        called: What an error calls it.

    Returns:
        The state as JSON gives it back.

    Raises:
        ConfigError: JSON cannot hold it.
    """
    try:
        state: dict[str, Any] = json.loads(json.dumps(hook.state_dict()))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{called} has a state that JSON cannot hold ({error}): let its state_dict return "
            "numbers, text, lists and dicts alone."
        ) from None
    return state


class TrainingRun:
    """What a hook sees: the run, how far it has come, and the step under way.

    Attributes:
        plan: The run.
        engine: This rank's engine.
        hooks: All hooks, in order.
        step: Optimizer steps taken, the one under way not counted.
        num_skipped: Steps among them whose update was left out.
        batches: This replica's micro batches of the step under way.
        lr: Its learning rate.
        result: What it measured; None before its end.
        metrics: Numbers that are logged with the next step that is; by name, with their units.
        records: Records that are logged after this step, whether the step itself is or not.
        paused_seconds: Time spent in `paused`.
        stopped_by: The signal that ends the run after this step.
        judged_averages: Losses of the held-out windows with each average of the weights, by its
            name; of the last validation.
        judged_further: The same by each loss of the run beside its own.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        hooks: Sequence[Hook],
        watchdog: Watchdog | None,
        printer: Printer | None,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.hooks = hooks
        self.step = plan.first_step
        self.num_skipped = 0 if plan.saved is None else plan.saved.skipped_steps
        self.batches: Sequence[Batch] = ()
        self.lr = 0.0
        self.result: StepResult | None = None
        self.metrics: dict[str, float] = {}
        self.records: list[dict[str, Any]] = []
        self.paused_seconds = 0.0
        self.stopped_by: signal.Signals | None = None
        self.judged_averages: dict[str, JudgedWindows] = {}
        self.judged_further: list[JudgedWindows] = []
        self._loss_sum: Tensor | None = None
        self._mean_loss: float | None = None
        self._watchdog = watchdog
        self._printer = printer
        length = build_objective(plan.config).mean_length(plan.config.data.seq_length)
        self._flops_per_sample = six_nd_flops(plan.config.model, length)

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.plan.config

    @property
    def mesh(self) -> Mesh:
        """This rank's place."""
        return self.engine.mesh

    def list_weight_states(self) -> dict[str, WeightState]:
        """What the hooks keep of every weight, by name."""
        return {name: one for hook in self.hooks for name, one in hook.weight_states().items()}

    @property
    def is_last_step(self) -> bool:
        """Are all steps of the plan taken?"""
        return self.step == self.plan.num_steps

    @property
    def is_logged(self) -> bool:
        """Is the step just taken one that is logged?"""
        return self.is_due(self.config.reporting.log_every_steps)

    def is_due(self, every_steps: int | None) -> bool:
        """Is it time for what is done every so many steps, and at the end; None: at the end?"""
        return self.is_last_step or (every_steps is not None and self.step % every_steps == 0)

    def begin_step(self, batches: Sequence[Batch], lr: float) -> None:
        """Begins a step. For the trainer."""
        self.batches, self.lr, self.result = batches, lr, None
        self._loss_sum = self._mean_loss = None

    def note_loss(self, loss_sum: Tensor) -> None:
        """Takes this rank's loss sum. For the trainer."""
        self._loss_sum = loss_sum

    def end_step(self, result: StepResult) -> None:
        """Ends a step. For the trainer."""
        self.result, self._loss_sum = result, result.loss_sum
        self.step += 1
        self.num_skipped += not result.is_applied

    def mean_loss(self) -> float:
        """Mean loss of the step over all ranks, nats per token.

        Every rank has to ask. The ranks wait for each other the first time; a step that nobody
        asks about costs nothing.
        """
        if self._mean_loss is None:
            assert self._loss_sum is not None
            total = self._loss_sum.clone()
            dist.all_reduce(total)
            self._mean_loss = total.item() / self.config.batch.global_batch_size
        return self._mean_loss

    def measure_progress(self) -> dict[str, Any]:
        """How far the run has come, as every record of its metrics says it."""
        samples = self.step * self.config.batch.global_batch_size
        return {
            "step": self.step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.config.data.seq_length,
            "consumed_flops_6nd": samples * self._flops_per_sample,
            "epoch": samples / self.plan.data.train.num_windows,
        }

    def log(self, metrics: Mapping[str, float]) -> None:
        """Logs numbers as a record of their own, with how far the run has come.

        Args:
            metrics: By name, with their units.
        """
        self.records.append({**self.measure_progress(), **metrics})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block, such as a validation, out of the run's throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused_seconds += time.perf_counter() - start

    def mark(self, place: str) -> None:
        """Tells the watchdog that this rank gets on.

        Args:
            place: What comes now, as in `validating`.
        """
        if self._watchdog is not None:
            self._watchdog.mark(self.step, place)

    def say(self, line: str) -> None:
        """Shows a line to the user, on the first rank."""
        if self._printer is not None:
            self._printer.say(line)
