"""Skipped steps: losses and gradients that are not finite, and spikes of the loss."""

from __future__ import annotations

import math
from typing import Any

from megatron_mdm.config import FaultsConfig
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.training.hooks import Hook, TrainingRun

_DECAY = 0.99
# An average of fewer steps says little, and at the start the loss falls fast.
_STEPS_BEFORE_SPIKES = 100


class StepGuard(Hook):
    """Decides which updates are skipped. All ranks decide alike, from equal numbers."""

    name = "guard"

    def __init__(self, faults: FaultsConfig) -> None:
        self._limit = faults.max_skipped_steps
        self._spike_factor = faults.loss_spike_factor
        self._in_a_row = 0
        # Moving average of the loss of accepted steps, nats per token; None without a factor.
        self.loss_average: float | None = None

    def accepts_update(self, run: TrainingRun) -> bool:
        """Is the loss no spike? A loss that is not finite is skipped by its gradient instead."""
        if self._spike_factor is None:
            return True
        return not self._is_spike(run.mean_loss(), run.step - run.num_skipped)

    def after_step(self, run: TrainingRun) -> None:
        """Counts the step, and says why it was left out if it was.

        Raises:
            BadStepsError: There were too many such steps in a row.
        """
        result = run.result
        assert result is not None
        if result.is_applied:
            self._in_a_row = 0
            if self._spike_factor is not None:
                loss = run.mean_loss()
                before = loss if self.loss_average is None else self.loss_average
                self.loss_average = _DECAY * before + (1 - _DECAY) * loss
            return
        self._in_a_row += 1
        # A step that was left out was none of the accepted ones.
        num_accepted = run.step - run.num_skipped
        reason = self._explain(run.mean_loss(), result.grad_norm, num_accepted)
        run.say(f"step {run.step:>4}/{run.plan.num_steps} | skipped ({reason})")
        if self._in_a_row >= self._limit:
            raise BadStepsError(
                f"The last {self._in_a_row} steps up to step {run.step} were skipped (the last: "
                f"{reason}), as many as faults.max_skipped_steps={self._limit} allows, and nothing "
                "was saved: look for damaged data or hardware, lower optimizer.lr, or raise "
                "faults.max_skipped_steps, and start the same command again."
            )

    def state_dict(self) -> dict[str, Any]:
        """The average that spikes are told by."""
        return {"loss_average": self.loss_average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the average, if spikes are looked for."""
        if self._spike_factor is not None:
            self.loss_average = state["loss_average"]

    def _is_spike(self, loss: float, num_accepted: int) -> bool:
        if self._spike_factor is None or self.loss_average is None:
            return False
        return (
            num_accepted >= _STEPS_BEFORE_SPIKES and loss > self._spike_factor * self.loss_average
        )

    def _explain(self, loss: float, grad_norm: float, num_accepted: int) -> str:
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not self._is_spike(loss, num_accepted):
            return f"gradient norm {grad_norm}"
        return (
            f"loss {loss:.4f} over {self._spike_factor:g} times its average {self.loss_average:.4f}"
        )
