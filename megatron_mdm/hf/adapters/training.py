"""Learning adapters: the trainer's batches, objective and schedule, in data parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from megatron_mdm.config import Config
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.distributed.topology import Topology
from megatron_mdm.hf.adapters.model import AdaptedModel
from megatron_mdm.reporting.validation_history import ValidationHistory
from megatron_mdm.training.data_plan import DataPlan, training_batches
from megatron_mdm.training.epochs import Epochs, exact_fraction
from megatron_mdm.training.optimizers import build_optimizer
from megatron_mdm.training.validation import Validation

# Keeps dropout apart from other draws with the same seed.
_DROPOUT_DOMAIN = 0x10A
Record = dict[str, float | int]


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to, the same on every rank.

    Attributes:
        loss: Mean over the global batch, nats per token.
        grad_norm: Norm of the adapters' gradient before clipping.
    """

    loss: float
    grad_norm: float


class AdapterTrainer:
    """Learns the adapters of a model. Every rank holds the whole model.

    Args:
        config: The run; of `parallel`, `checkpoint`, `faults` and `reporting` only
            `reporting.log_every_steps` counts.
        data: Its data.
        model: The same on every rank.
    """

    def __init__(self, config: Config, data: DataPlan, model: AdaptedModel) -> None:
        self._config, self._data, self._model = config, data, model
        self._adapters = model.adapters()
        self._optimizer = build_optimizer(nn.ParameterList(self._adapters), config.optimizer)
        self._validation = Validation(config, data.train, data.valid, data.read_content())
        self._history = ValidationHistory()
        self._epochs = Epochs(data.train.num_windows, config.batch.global_batch_size)
        rank, size = dist.get_rank(), dist.get_world_size()
        self.topology = Topology(model.device, rank, size, 0, 1, 0, 1, rank, size)

    def fit(self, log: Callable[[Record], None]) -> None:
        """Trains to the end of the schedule.

        Args:
            log: Takes the record of each logged step and validation, under the trainer's names, on
                every rank.

        Raises:
            BadStepsError: The loss or the gradient is not finite.
            DataError: A window cannot be used.
        """
        config, num_steps = self._config, self._data.num_steps
        batches = training_batches(
            self._config,
            self._data,
            data_parallel_rank=self.topology.data_rank,
            data_parallel_size=self.topology.data_size,
        )
        threads = config.data.reader_threads
        for step, micro in enumerate(batches.iterate(0, num_steps, threads=threads)):
            lr = config.schedule.rate(
                step, num_steps, lr=config.optimizer.lr, min_lr=config.optimizer.min_lr
            )
            outcome = self.train_step(step, micro, lr)
            done = step + 1
            if done % config.reporting.log_every_steps == 0 or done == num_steps:
                log(
                    {
                        "step": done,
                        "train/loss_nats_per_token": outcome.loss,
                        "train/grad_norm": outcome.grad_norm,
                        "train/lr": lr,
                        "epoch": done
                        * config.batch.global_batch_size
                        / self._data.train.num_windows,
                    }
                )
            if self._is_validation_due(done):
                log(self.validate(done))

    def train_step(self, step: int, batches: list[Batch], lr: float) -> StepOutcome:
        """Forward, backward and update on one global batch.

        Args:
            step: Optimizer step, from 0.
            batches: This rank's micro batches.
            lr: Learning rate.

        Returns:
            Loss and gradient norm.

        Raises:
            BadStepsError: One of them is not finite; the adapters are as before the step.
        """
        self._model.peft.train()
        key = (self._config.run.seed, _DROPOUT_DOMAIN, step, self.topology.rank)
        torch.manual_seed(int(seed_sequence(*key).generate_state(1)[0]))
        self._optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._model.device)
        for batch in batches:
            for _, losses_R in self._losses(batch):
                torch.autograd.backward(losses_R.sum() / self._config.batch.global_batch_size)
                loss_sum += losses_R.detach().double().sum()
        self._add_up_gradients()
        dist.all_reduce(loss_sum)
        loss = loss_sum.item() / self._config.batch.global_batch_size
        limit = self._config.optimizer.clip_grad or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._adapters, limit))
        if not math.isfinite(loss + norm):
            raise BadStepsError(
                f"At step {step + 1} the loss is {loss:.4g} and the gradient's norm {norm:.4g}: "
                "begin again with a lower optimizer.lr or more steps of warm-up."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return StepOutcome(loss, norm)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Weighted losses of each sequence of a micro batch; see `training.Engine.evaluate`.

        Args:
            batch: B samples.

        Returns:
            float64 [B].
        """
        self._model.peft.eval()
        losses_B = torch.zeros(len(batch.inputs_BS), dtype=torch.float64, device=self._model.device)
        for samples_R, losses_R in self._losses(batch):
            losses_B.index_add_(0, samples_R, losses_R.double())
        return losses_B

    def validate(self, step: int) -> Record:
        """The held-out loss on the trainer's windows and noise.

        Args:
            step: Optimizer steps taken.

        Returns:
            Metrics by the trainer's names, the same on every rank.
        """
        found, judged = self._validation(self)
        record: Record = {"step": step, **found}
        return record | self._history.add(record, judged)

    def _is_validation_due(self, done: int) -> bool:
        settings = self._config.validation
        if self._validation.is_empty:
            return False
        if done == self._data.num_steps:
            return True
        if settings.every_epochs is not None:
            return self._epochs.ends_with(done, exact_fraction(settings.every_epochs))
        return settings.every_steps is not None and done % settings.every_steps == 0

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        return self._model.losses(batch, batch.inputs_BS.size)

    def _add_up_gradients(self) -> None:
        """Sums the gradients of all ranks in one message; adapters are small."""
        for one in self._adapters:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        grads = [one.grad for one in self._adapters if one.grad is not None]
        flat = parameters_to_vector(grads)
        dist.all_reduce(flat)
        vector_to_parameters(flat, grads)
