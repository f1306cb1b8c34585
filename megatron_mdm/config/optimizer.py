"""The optimizer: the section `optimizer`, whose class is that of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.section import NonNegativeFloat, PositiveFloat
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.registry import Registry

if TYPE_CHECKING:
    # For types alone: a configuration is read before the engines are imported, which takes seconds.
    import torch


class ParameterGroups(NamedTuple):
    """What an optimizer is built for.

    Attributes:
        matrices: Weight decay is for these.
        vectors: Norm weights and biases.
    """

    matrices: list[torch.nn.Parameter]
    vectors: list[torch.nn.Parameter]


class OptimizerConfig(Component):
    """What every optimizer has; the kinds are sections beside their code.

    Attributes:
        needs_whole_parameters: Does it need the shape of a parameter? ZeRO hands it flat pieces.
    """

    lr: PositiveFloat = Field(default=2e-4, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(default=2e-5, description="Learning rate at the end.")
    clip_grad: NonNegativeFloat = Field(
        default=1.0, description="Largest global gradient norm; 0 switches clipping off."
    )

    needs_whole_parameters: ClassVar[bool] = False

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Makes the optimizer; `lr` of its groups is set anew before each step."""
        raise NotImplementedError

    def initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of a parameter, before its first step.

        Args:
            parameter: A parameter, or under ZeRO a flat piece of several.

        Returns:
            By the names that the optimizer uses: float32 tensors of the parameter's shape, and
            numbers without a dimension that are the same for every parameter, such as a count of
            steps. All of it is saved and goes on under any other layout.
        """
        raise NotImplementedError

    def list_state_names(self) -> list[str]:
        """Names of the states that are as large as the parameter.

        Raises:
            ConfigError: A state is neither that nor a number.
        """
        import torch

        names = []
        probe = torch.zeros(2, 3)
        for name, state in self.initial_state(probe).items():
            if state.shape == probe.shape:
                names.append(name)
            elif state.dim():
                raise ConfigError(
                    f"optimizer.kind={self.kind} keeps {name} in another shape than the "
                    "parameter's, which cannot be divided as it is: keep numbers, and tensors of "
                    "the parameter's shape."
                )
        return names

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr={self.min_lr} is greater than optimizer.lr={self.lr}: lower "
                "min_lr."
            )
        return self


OPTIMIZERS = Registry(
    "an optimizer", OptimizerConfig, {"adamw": "megatron_mdm.training.optimizers:AdamWConfig"}
)
CHOSEN_OPTIMIZER = ChosenFrom(OPTIMIZERS, "optimizer", "adamw")
