"""Epochs of a run: the steps that end them, and the mean training loss of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError


@dataclass(frozen=True)
class Epochs:
    """Epochs as a run's metrics count them: samples over the windows of all sources.

    In a mixture some windows come more often than others; an epoch is then as many samples as
    there are windows.

    Attributes:
        num_windows: Windows of all training sources.
        global_batch_size: Samples a step.
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


class EpochLoss:
    """The mean training loss of the epoch under way, as trained: with dropout, before the updates.

    A run that goes on in the middle of an epoch has no mean for it, for it has not seen all of it.

    Args:
        epochs: The run's epochs.
        first_step: Steps that the run had taken when it started.
        device: Where the losses are.
    """

    def __init__(self, epochs: Epochs, first_step: int, device: torch.device) -> None:
        self._epochs = epochs
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._num_steps = 0
        self._is_whole = first_step == 0 or epochs.ends_with(first_step)

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


def exact_fraction(number: float) -> Fraction:
    """A number of the configuration at its word: 0.1 is a tenth.

    Args:
        number: Finite.

    Returns:
        The decimal fraction that the number prints as.
    """
    return Fraction(str(number))


def check_validation_interval(config: Config, num_windows: int) -> None:
    """Refuses to validate more often than once a step.

    Args:
        config: The run.
        num_windows: Windows of all training sources.

    Raises:
        ConfigError: `validation.every_epochs` is less than a step.
    """
    every, batch = config.validation.every_epochs, config.batch.global_batch_size
    if every is None or exact_fraction(every) * num_windows >= batch:
        return
    unit = 10.0 ** (math.floor(math.log10(batch / num_windows)) - 2)
    least = math.ceil(batch / num_windows / unit) * unit
    raise ConfigError(
        f"validation.every_epochs={every} of the {num_windows} training windows is less than one "
        f"step of batch.global_batch_size={batch} samples: use at least {least:.3g}, or "
        "validation.every_steps=1."
    )
