"""The optimizer: the section `optimizer`, whose class is that of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.parameter_groups import ROLES, ParameterGroups, ParameterRole
from megatron_mdm.config.section import NonNegativeFloat, PositiveFloat
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.registry import Registry

if TYPE_CHECKING:
    # For types alone: a configuration is read before the engines are imported, which takes seconds.
    import torch


class OptimizerConfig(Component):
    """What every optimizer has; the kinds are sections beside their code.

    Attributes:
        needs_whole_parameters: Does it need the shape of what it steps? ZeRO hands it flat pieces,
            and is refused then.
        whole_roles: Roles of the parameters of which it asks `ParameterGroups.wholes` in each step,
            under any layout; for estimates of memory and communication.
    """

    lr: PositiveFloat = Field(default=2e-4, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(default=2e-5, description="Learning rate at the end.")
    clip_grad: NonNegativeFloat = Field(
        default=1.0, description="Largest global gradient norm; 0 switches clipping off."
    )

    needs_whole_parameters: ClassVar[bool] = False
    whole_roles: ClassVar[tuple[ParameterRole, ...]] = ()

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Makes the optimizer.

        Before each step `lr` of its groups is set anew, and `weight_decay` where they have it.
        Under ZeRO each of its groups becomes flat tensors of its own, and every pipeline stage
        needs as many groups as the others.
        """
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

    def initial_state_of(
        self, role: ParameterRole, parameter: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same for an optimizer that keeps other things of other roles.

        Args:
            role: Of the parameter; of all pieces of a flat tensor the same is kept, that of the
                first one's role.
            parameter: As for `initial_state`.

        Returns:
            As `initial_state`, which is what it returns unless it is overridden.
        """
        del role
        return self.initial_state(parameter)

    def list_all_state_names(self) -> list[str]:
        """Names of the states of any role that are as large as the parameter.

        Raises:
            ConfigError: A state is neither that nor a number.
        """
        return list(dict.fromkeys(name for role in ROLES for name in self.list_state_names(role)))

    def list_state_names(self, role: ParameterRole) -> list[str]:
        """Names of the states that are as large as the parameter.

        Args:
            role: Of the parameter.

        Raises:
            ConfigError: A state is neither that nor a number.
        """
        import torch

        names = []
        probe = torch.zeros(2, 3)
        for name, state in self.initial_state_of(role, probe).items():
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
    "an optimizer",
    OptimizerConfig,
    {
        "adamw": "megatron_mdm.training.optimizers:AdamWConfig",
        "muon": "megatron_mdm.training.muon:MuonConfig",
    },
)
CHOSEN_OPTIMIZER = ChosenFrom(OPTIMIZERS, "optimizer", "adamw")
