"""Steps that are left out: losses and gradients that are not finite, and spikes of the loss."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_mdm.config import FaultsConfig
from megatron_mdm.core.errors import BadStepsError

_DECAY = 0.99
# An average of fewer steps says little, and at the start the loss falls fast.
_STEPS_BEFORE_SPIKES = 100


class StepGuard:
    """Decides which steps count. All ranks decide alike, from numbers that are alike.

    Args:
        faults: Limits.
        num_accepted: Steps whose update was made before.
        num_skipped: Steps whose update was left out before.
        loss_average: Moving average of the loss of accepted steps, None at the start.

    Attributes:
        num_skipped: Steps whose update was left out since the run's first step.
        loss_average: Moving average of the loss of accepted steps, nats per token; None without a
            guard against spikes.
    """

    def __init__(
        self, faults: FaultsConfig, num_accepted: int, num_skipped: int, loss_average: float | None
    ) -> None:
        self._limit = faults.max_skipped_steps
        self._spike_factor = faults.loss_spike_factor
        self._num_accepted = num_accepted
        self._in_a_row = 0
        self.num_skipped = num_skipped
        self.loss_average = loss_average if self._spike_factor is not None else None

    @property
    def needs_loss(self) -> bool:
        """Has `accepts` to be asked before each update?"""
        return self._spike_factor is not None

    def accepts(self, loss: float) -> bool:
        """Is a step's loss no spike? A loss that is not finite is left to its gradient.

        Args:
            loss: Mean of the step over all ranks, nats per token.

        Returns:
            False if the update has to be left out.
        """
        if self._spike_factor is None or self.loss_average is None:
            return True
        if self._num_accepted < _STEPS_BEFORE_SPIKES:
            return True
        return not loss > self._spike_factor * self.loss_average

    def count(self, is_applied: bool, loss: float | None) -> None:
        """Counts a step.

        Args:
            is_applied: Was the update made?
            loss: Mean of the step over all ranks; may be None if `needs_loss` is False.
        """
        if not is_applied:
            self.num_skipped += 1
            self._in_a_row += 1
            return
        self._in_a_row = 0
        self._num_accepted += 1
        if self._spike_factor is not None and loss is not None:
            before = loss if self.loss_average is None else self.loss_average
            self.loss_average = _DECAY * before + (1 - _DECAY) * loss

    def reason(self, loss: float, grad_norm: float) -> str:
        """Why a step was left out, for the console.

        Args:
            loss: Mean of the step over all ranks, nats per token.
            grad_norm: Global gradient norm.

        Returns:
            For example `loss nan`.
        """
        if not math.isfinite(loss):
            return f"loss {loss}"
        if self.accepts(loss):
            return f"gradient norm {grad_norm}"
        return (
            f"loss {loss:.4f} over {self._spike_factor:g} times its average {self.loss_average:.4f}"
        )

    def check(self, step: int, reason: str) -> None:
        """Ends the run after too many skipped steps in a row.

        Args:
            step: Steps taken.
            reason: Why the last one was left out.

        Raises:
            BadStepsError: There were too many.
        """
        if self._in_a_row >= self._limit:
            raise BadStepsError(
                f"The last {self._in_a_row} steps up to step {step} were skipped (the last: "
                f"{reason}), as many as faults.max_skipped_steps={self._limit} allows, and nothing "
                "was saved: look for damaged data or hardware, lower optimizer.lr, or raise "
                "faults.max_skipped_steps, and start the same command again."
            )


def spoil_gradients(optimizer: Any) -> None:
    """Makes a sharded optimizer leave out its next update by its own rule.

    DeepSpeed leaves out a step whose global gradient norm is not finite, and tidies up after it;
    each ZeRO stage keeps its reduced gradients elsewhere.

    Args:
        optimizer: What `deepspeed.initialize` returned for ZeRO stage 1, 2 or 3, after the last
            backward of a step.
    """
    if hasattr(optimizer, "fp32_groups_gradients"):
        groups = optimizer.fp32_groups_gradients
    else:
        groups = list(optimizer.averaged_gradients.values())
    for gradients in groups:
        for gradient in gradients or ():
            if gradient is not None:
                gradient.fill_(math.nan)


def finite_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is not finite if it is not.

    An infinite cross-entropy has a finite gradient, which would let the step pass.

    Args:
        loss: A scalar.

    Returns:
        The loss, bit for bit where it is finite.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
