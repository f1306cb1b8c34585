"""AdamW, and optimizers of modules that no layout divides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_mdm.config.optimizer import OptimizerConfig
from megatron_mdm.config.parameter_groups import (
    OptimizedParameter,
    ParameterGroups,
    WholeParameters,
)
from megatron_mdm.config.section import NonNegativeFloat, PositiveFloat, Probability

if TYPE_CHECKING:
    import torch


class AdamWConfig(OptimizerConfig):
    """AdamW, in PyTorch's fused kernel on CPUs and GPUs."""

    kind: str = Field(default="adamw", description="Which optimizer.")
    beta1: Probability = Field(default=0.9, description="Decay of the first moment.")
    beta2: Probability = Field(default=0.95, description="Decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: NonNegativeFloat = Field(
        default=0.1, description="Decoupled weight decay; norm weights and biases are exempt."
    )

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Makes it, with weight decay on matrices only."""
        import torch

        return torch.optim.AdamW(
            [
                {"params": groups.matrices, "weight_decay": self.weight_decay},
                {"params": groups.vectors, "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two moments, and the count of steps that the bias correction uses."""
        return make_adam_state(parameter)


def make_adam_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Makes what Adam keeps of a parameter, on its device."""
    import torch

    return {
        "step": torch.tensor(0.0, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
    }


class Rates:
    """Learning rate and weight decay of an optimizer, set before each step.

    Args:
        groups: Its parameter groups, with the weight decay that a factor of 1 stands for.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._weight_decays = [group.get("weight_decay") for group in groups]

    def set(self, lr: float, decay_factor: float = 1.0) -> None:
        """Sets both; the decay of those groups that know one."""
        for group, weight_decay in zip(self._groups, self._weight_decays, strict=True):
            group["lr"] = lr
            if weight_decay is not None:
                group["weight_decay"] = weight_decay * decay_factor


def build_optimizer(module: torch.nn.Module, section: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of any module that nothing divides; all its matrices are hidden ones."""
    parameters = [
        OptimizedParameter(
            name=name,
            role="hidden" if tensor.dim() > 1 else "vector",
            decays=tensor.dim() > 1,
            shape=tuple(tensor.shape),
            tensor=tensor,
        )
        for name, tensor in module.named_parameters()
    ]
    return section.build(ParameterGroups(parameters, WholeParameters(parameters)))
