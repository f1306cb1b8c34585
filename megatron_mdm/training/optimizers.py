"""AdamW, and how a model's parameters are handed to an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_mdm.config.optimizer import OptimizerConfig, ParameterGroups
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
        import torch

        return {
            "step": torch.tensor(0.0, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
        }


def build_optimizer(module: torch.nn.Module, section: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of a model."""
    parameters = list(module.parameters())
    return section.build(
        ParameterGroups(
            matrices=[parameter for parameter in parameters if parameter.dim() > 1],
            vectors=[parameter for parameter in parameters if parameter.dim() == 1],
        )
    )
