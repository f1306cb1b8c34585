"""Epochs of a run: the steps that end them, and the mean training loss of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.training.hooks import Hook, TrainingRun


@dataclass(frozen=True)
class Epochs:
    """Epochs as a run's metrics count them: samples over the windows of all sources.

    In a mixture some windows come more often than others; an epoch is then as many samples as
    there are windows.

    Attributes:
        num_windows: Windows of all training sources.
        global_batch_size: Samples per step.
    """

    num_windows: int
    global_batch_size: int

    def ends_with(self, step: int, every: Fraction = Fraction(1)) -> bool:
        """Does a step end a stretch of epochs?

        The k-th stretch ends with step ceil(k * every * windows / batch). Each is computed from
        the start of the run, so that the remainders of division do not add up.

        Args:
            step: Steps taken, 1 or more.
            every: Length of a stretch in epochs, above 0.

        Returns:
            Whether one or more stretches end with it.
        """
        steps = every * self.num_windows / self.global_batch_size
        return step // steps > (step - 1) // steps


class EpochLoss(Hook):
    """The mean training loss of the epoch under way, as trained: with dropout, before the updates.

    A run that begins in the middle of an epoch without a state of this hook has no mean for that
    epoch, since it has not seen all of it.

    Args:
        epochs: The run's epochs.
        first_step: Steps that the run had taken when it started.
        device: Where the losses are.
    """

    name = "epoch_loss"

    def __init__(self, epochs: Epochs, first_step: int, device: torch.device) -> None:
        self._epochs = epochs
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._num_steps = 0
        self._is_whole = first_step == 0 or epochs.ends_with(first_step)
        self._sums: list[float] = []

    def after_step(self, run: TrainingRun) -> None:
        """Adds the step's losses."""
        assert run.result is not None
        self.add(run.step, run.result.loss_sum, run.result.is_applied)

    def after_validation(self, run: TrainingRun, record: dict[str, Any], judged: object) -> None:
        """Adds the mean to the record of a validation at the end of an epoch."""
        del judged
        mean = self.mean(run.step)
        if mean is not None:
            record["train/epoch_loss_nats_per_token"] = mean

    def before_save(self, run: TrainingRun) -> None:
        """Gathers the sums of all ranks."""
        sums = [torch.zeros_like(self._sum) for _ in range(run.mesh.world_size)]
        dist.all_gather(sums, self._sum)
        self._sums = [total.item() for total in sums]

    def state_dict(self) -> dict[str, Any]:
        """The sum of every rank, so that the same ranks go on with the same rounding."""
        return {"sums": self._sums, "num_steps": self._num_steps, "is_whole": self._is_whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes this rank's sum; where there are other ranks than before, the first takes all."""
        sums, rank = state["sums"], dist.get_rank()
        if len(sums) != dist.get_world_size():
            sums = [math.fsum(sums)]
        self._sum.fill_(sums[rank] if rank < len(sums) else 0.0)
        self._num_steps, self._is_whole = state["num_steps"], state["is_whole"]

    def add(self, step: int, loss_sum: Tensor, is_applied: bool) -> None:
        """Adds a step's losses, without waiting for the device.

        Args:
            step: The step's number, from 1; every step is added, in order.
            loss_sum: Sum over this rank's samples, nats per token.
            is_applied: A step whose update was left out does not count; the same on all ranks.
        """
        if step > 1 and self._epochs.ends_with(step - 1):
            self._sum.zero_()
            self._num_steps = 0
            self._is_whole = True
        if is_applied:
            self._sum += loss_sum
            self._num_steps += 1

    def mean(self, step: int) -> float | None:
        """The mean of an epoch that ends with the step just added; all ranks have to ask.

        Args:
            step: The step's number.

        Returns:
            Nats per token, the same on every rank. None if no epoch ends here, or the run did not
            see its start, or no step of it was applied.
        """
        if not (self._is_whole and self._num_steps and self._epochs.ends_with(step)):
            return None
        total = self._sum.clone()
        dist.all_reduce(total)
        return total.item() / (self._num_steps * self._epochs.global_batch_size)


def parse_fraction(number: float) -> Fraction:
    """Parses a number of the configuration as a decimal fraction: 0.1 is a tenth.

    Args:
        number: Finite.

    Returns:
        The decimal fraction that the number prints as.
    """
    return Fraction(str(number))


def check_validation_interval(config: Config, num_windows: int) -> None:
    """Refuses to validate more often than once per step.

    Args:
        config: The run.
        num_windows: Windows of all training sources.

    Raises:
        ConfigError: `validation.every_epochs` is less than a step.
    """
    every, batch = config.validation.every_epochs, config.batch.global_batch_size
    if every is None or parse_fraction(every) * num_windows >= batch:
        return
    unit = 10.0 ** (math.floor(math.log10(batch / num_windows)) - 2)
    least = math.ceil(batch / num_windows / unit) * unit
    raise ConfigError(
        f"validation.every_epochs={every} of the {num_windows} training windows is less than one "
        f"step of batch.global_batch_size={batch} samples: use at least {least:.3g}, or "
        "validation.every_steps=1."
    )
