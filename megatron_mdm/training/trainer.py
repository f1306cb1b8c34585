"""The training loop: batch, step, hooks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_mdm.core.errors import MdmError
from megatron_mdm.data.loader import Batch, TrainingBatches
from megatron_mdm.training.hooks import Hook, TrainingRun


class Trainer:
    """Runs a plan's steps."""

    def __init__(self, run: TrainingRun, batches: TrainingBatches) -> None:
        self._run = run
        self._batches = batches

    def fit(self) -> signal.Signals | None:
        """Trains to the end of the plan, or until a hook ends the run.

        Returns:
            The signal that asked for an earlier end, after saving; None at the end of the plan.

        Raises:
            MdmError: What a hook or the data cannot go on with.
        """
        run = self._run
        threads = run.config.data.reader_threads
        with _close_at_end(run.hooks):
            run.mark("reading")
            for batches in self._batches.iterate(run.step, run.plan.num_steps, threads=threads):
                self._take_step(batches)
                if run.stopped_by is not None:
                    break
                run.mark("reading")
        return run.stopped_by

    def _take_step(self, batches: list[Batch]) -> None:
        run = self._run
        run.mark("training")
        optimizer, schedule = run.config.optimizer, run.config.schedule
        lr = schedule.rate(run.step, run.plan.num_steps, lr=optimizer.lr, min_lr=optimizer.min_lr)
        run.begin_step(batches, lr)
        for hook in run.hooks:
            hook.before_step(run)
        decay = schedule.weight_decay.factor(run.step, run.plan.num_steps)
        if schedule.weight_decay.varies:
            run.metrics["train/weight_decay_factor"] = decay
        run.end_step(run.engine.train_step(run.step, batches, lr, self._accepts, decay))
        for hook in run.hooks:
            hook.after_step(run)

    def _accepts(self, loss_sum: Tensor) -> bool:
        self._run.note_loss(loss_sum)
        return all(hook.accepts_update(self._run) for hook in self._run.hooks)


@contextlib.contextmanager
def _close_at_end(hooks: Sequence[Hook]) -> Iterator[None]:
    """Closes all hooks, the last first; an error of the block takes precedence over theirs."""
    has_failed = True

    def close(hook: Hook) -> None:
        with contextlib.suppress(MdmError) if has_failed else contextlib.nullcontext():
            hook.close()

    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(close, hook)
        yield
        has_failed = False
