"""Learning adapters: the trainer's loop, batches, objective and schedule, in data parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from megatron_mdm.config import Config
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.distributed.mesh import Dimension, Mesh
from megatron_mdm.hf.adapters.model import AdaptedModel
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.validation_history import ValidationHistory
from megatron_mdm.training.data_plan import open_batches
from megatron_mdm.training.engine import Engine, StepResult
from megatron_mdm.training.epochs import Epochs
from megatron_mdm.training.hooks import Hook, TrainingRun
from megatron_mdm.training.optimizers import Rates, build_optimizer
from megatron_mdm.training.plan import RunPlan
from megatron_mdm.training.trainer import Trainer
from megatron_mdm.training.validation import Validating, Validation

# Keeps dropout apart from other draws with the same seed.
_DROPOUT_DOMAIN = 0x10A
Record = dict[str, float | int]
Log = Callable[[Record], None]


class AdapterEngine:
    """Trains the adapters of a model as `training.Engine` trains a model.

    Every rank holds the whole model.

    Args:
        config: The run.
        model: The same on every rank.
    """

    def __init__(self, config: Config, model: AdaptedModel) -> None:
        self._config, self._model = config, model
        self._adapters = model.list_adapters()
        self._optimizer = build_optimizer(nn.ParameterList(self._adapters), config.optimizer)
        self._rates = Rates(self._optimizer.param_groups)
        rank, size = dist.get_rank(), dist.get_world_size()
        self.mesh = Mesh(model.device, rank, size, dp=Dimension(rank, size))

    def train_step(
        self,
        step: int,
        batches: Sequence[Batch],
        lr: float,
        accepts: Callable[[Tensor], bool] = lambda loss_sum: True,
        decay_factor: float = 1.0,
    ) -> StepResult:
        """Forward, backward and update on one global batch.

        Args:
            step: Optimizer step, from 0.
            batches: This rank's micro batches.
            lr: Learning rate.
            accepts: As `training.Engine` asks it.
            decay_factor: Of the optimizer's weight decay.

        Returns:
            Loss, gradient norm and whether the update was made: not where one of them is not
            finite.
        """
        self._model.peft.train()
        key = (self._config.run.seed, _DROPOUT_DOMAIN, step, self.mesh.rank)
        torch.manual_seed(int(seed_sequence(*key).generate_state(1)[0]))
        self._optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._model.device)
        for batch in batches:
            for _, losses_R in self._compute_losses(batch):
                torch.autograd.backward(losses_R.sum() / self._config.batch.global_batch_size)
                loss_sum += losses_R.detach().double().sum()
        self._add_up_gradients()
        is_accepted = accepts(loss_sum)
        limit = self._config.optimizer.clip_grad or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._adapters, limit))
        if not is_accepted or not math.isfinite(norm):
            return StepResult(loss_sum, norm, False)
        self._rates.set(lr, decay_factor)
        self._optimizer.step()
        return StepResult(loss_sum, norm, True)

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
        for samples_R, losses_R in self._compute_losses(batch):
            losses_B.index_add_(0, samples_R, losses_R.double())
        return losses_B

    def _compute_losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        return self._model.compute_losses(batch, batch.inputs_BS.size)

    def _add_up_gradients(self) -> None:
        """Sums the gradients of all ranks in one message; adapters are small."""
        for one in self._adapters:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        grads = [one.grad for one in self._adapters if one.grad is not None]
        flat = parameters_to_vector(grads)
        dist.all_reduce(flat)
        vector_to_parameters(flat, grads)


class Records(Hook):
    """Takes the numbers of steps and validations; a step that is not finite ends the run.

    Args:
        log: Takes each record, under the trainer's names, on every rank.
    """

    name = "records"

    def __init__(self, log: Log) -> None:
        self._log = log
        self._history = ValidationHistory()

    def accepts_update(self, run: TrainingRun) -> bool:
        """Is the loss finite?"""
        return math.isfinite(run.mean_loss())

    def after_step(self, run: TrainingRun) -> None:
        """Gives the record of a step that is logged.

        Raises:
            BadStepsError: The loss or the gradient is not finite; the adapters are as before.
        """
        assert run.result is not None
        loss, norm = run.mean_loss(), run.result.grad_norm
        if not run.result.is_applied:
            raise BadStepsError(
                f"At step {run.step} the loss is {loss:.4g} and the gradient's norm {norm:.4g}: "
                "begin again with a lower optimizer.lr or more steps of warm-up."
            )
        if run.is_logged:
            self._log(
                {
                    "step": run.step,
                    "train/loss_nats_per_token": loss,
                    "train/grad_norm": norm,
                    "train/lr": run.lr,
                    "epoch": run.measure_progress()["epoch"],
                }
            )

    def after_validation(
        self, run: TrainingRun, record: dict[str, Any], judged: JudgedWindows | None
    ) -> None:
        """Gives the record of a validation, beside the best one before it."""
        found = {"step": run.step} | {name: record[name] for name in record if "/" in name}
        self._log(found | self._history.add(found, judged))


def learn_adapters(plan: RunPlan, model: AdaptedModel, log: Log) -> None:
    """Trains to the end of the schedule.

    Args:
        plan: The run; of the sections `parallel`, `checkpoint`, `faults` and `reporting` only
            `reporting.log_every_steps` counts.
        model: The same on every rank.
        log: Takes the record of each logged step and validation, on every rank.

    Raises:
        BadStepsError: The loss or the gradient is not finite.
        DataError: A window cannot be used.
    """
    config, data = plan.config, plan.data
    engine = AdapterEngine(config, model)
    dp = engine.mesh.dp
    content = data.read_content()
    validation = Validation(config, data.train, data.valid, content, data.num_steps)
    epochs = Epochs(data.train.num_windows, config.batch.global_batch_size)
    hooks = [Records(log), Validating(validation, epochs, None)]
    # It has the methods of an engine that the loop and the validation call.
    run = TrainingRun(plan, cast(Engine, engine), hooks, None, None)
    batches = open_batches(config, data, data_parallel_rank=dp.rank, data_parallel_size=dp.size)
    Trainer(run, batches).fit()
