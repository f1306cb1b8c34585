"""Components of training that live outside the package: an optimizer, a schedule, a hook."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from megatron_mdm.checkpoint.hook_states import WeightState
from megatron_mdm.config import Config, OptimizerConfig, ParameterGroups, ScheduleConfig
from megatron_mdm.config.hook import HookConfig
from megatron_mdm.config.parameter_groups import ROLES, ParameterRole
from megatron_mdm.config.section import PositiveInt, Probability
from megatron_mdm.training.hooks import Hook, TrainingRun


class MomentumConfig(OptimizerConfig):
    """Gradient descent with momentum."""

    momentum: Probability = Field(default=0.9, description="Decay of the running gradient.")

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Decays nothing."""
        parameters = [*groups.matrices, *groups.vectors]
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)

    def initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The running gradient."""
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=torch.float32)}


class WholeMomentumConfig(MomentumConfig):
    """The same, as if it needed the shapes of parameters."""

    needs_whole_parameters: ClassVar[bool] = True


class UnitStepConfig(OptimizerConfig):
    """Steps along each whole parameter's gradient, all of the same length."""

    whole_roles: ClassVar[tuple[ParameterRole, ...]] = ROLES

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Decays nothing."""
        return UnitSteps(groups, self.lr)

    def initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keeps nothing."""
        return {}


class UnitSteps(torch.optim.Optimizer):
    """Needs the norm of a whole gradient, whatever pieces of it a rank steps."""

    def __init__(self, groups: ParameterGroups, lr: float) -> None:
        super().__init__([*groups.matrices, *groups.vectors], {"lr": lr})
        self.wholes = groups.wholes

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            tensors = [one for one in group["params"] if one.grad is not None]
            if not tensors:
                continue
            grads = [one.grad for one in tensors]
            self.wholes.replace(tensors, grads, lambda parameter, whole: whole / whole.norm())
            for tensor, grad in zip(tensors, grads, strict=True):
                tensor.add_(grad, alpha=-group["lr"])


class RowMomentumConfig(MomentumConfig):
    """The same, as if it kept a number per row."""

    def initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A state that cannot be divided."""
        return {"rows": torch.zeros(parameter.shape[0])}


class LineConfig(ScheduleConfig):
    """A line from the peak to min_lr."""

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Falls by the same at every step."""
        return lr - (lr - min_lr) * step / max(1, num_steps - 1)


class LargestLossConfig(HookConfig):
    """Logs the largest loss that the run has had."""

    every_steps: PositiveInt = Field(default=1, description="Look at every so many steps.")

    def build(self, config: Config) -> Hook:
        """Makes the hook."""
        del config
        return LargestLoss(self.every_steps)


class LargestLoss(Hook):
    """Keeps the largest loss.

    Args:
        every_steps: Look at every so many steps.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._largest = 0.0

    def after_step(self, run: TrainingRun) -> None:
        if run.step % self._every_steps == 0:
            self._largest = max(self._largest, run.mean_loss())
        run.metrics["train/largest_loss_nats_per_token"] = self._largest

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]


class FarthestConfig(HookConfig):
    """Keeps the largest magnitude that each weight has had."""

    def build(self, config: Config) -> Hook:
        """Makes the hook."""
        del config
        return Farthest()

    def list_weight_states(self) -> list[str]:
        """The magnitudes."""
        return ["farthest"]


class NearConfig(FarthestConfig):
    """Another hook that keeps something under the same name."""

    def build(self, config: Config) -> Hook:
        """Makes it."""
        del config
        return Hook()


class Farthest(Hook):
    """Keeps magnitudes beside the weights, wherever their pieces lie."""

    def begin(self, run: TrainingRun) -> None:
        self._pieces = [piece.abs() for piece in run.engine.states.list_pieces()]

    def after_step(self, run: TrainingRun) -> None:
        for kept, piece in zip(self._pieces, run.engine.states.list_pieces(), strict=True):
            torch.maximum(kept, piece.abs(), out=kept)

    def weight_states(self) -> dict[str, WeightState]:
        return {"farthest": WeightState(self._pieces, "largest magnitudes")}


class SetConfig(HookConfig):
    """A hook whose state JSON cannot hold."""

    def build(self, config: Config) -> Hook:
        """Makes the hook."""
        del config
        hook = Hook()
        hook.state_dict = lambda: {"seen": {1, 2}}  # type: ignore[method-assign]
        return hook
