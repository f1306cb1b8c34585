"""Muon: its section. What it does stands in `muon_steps.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_mdm.config.optimizer import OptimizerConfig
from megatron_mdm.config.parameter_groups import (
    OptimizedParameter,
    ParameterGroups,
    ParameterRole,
)
from megatron_mdm.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from megatron_mdm.training.optimizers import make_adam_state

if TYPE_CHECKING:
    import torch

Coefficients = Literal["quintic", "polar_express"]
Scale = Literal["moonlight", "keller"]


class MuonConfig(OptimizerConfig):
    """Muon for hidden matrices; AdamW for embeddings, output layer, norms and biases."""

    kind: str = Field(default="muon", description="Which optimizer.")
    momentum: Probability = Field(default=0.95, description="Decay of the running gradient.")
    nesterov: bool = Field(
        default=True, description="Step along the running gradient as it will be next, nearly."
    )
    ns_steps: PositiveInt = Field(default=5, description="Newton-Schulz iterations.")
    coefficients: Coefficients = Field(
        default="quintic",
        description="Polynomial of the iterations: quintic, the same in each, or polar_express, "
        "one for each of five.",
    )
    scale: Scale = Field(
        default="moonlight",
        description="What the step of a matrix is multiplied by besides lr: moonlight, "
        "0.2 sqrt(max(rows, columns)), with which the lr and weight_decay of AdamW carry over; or "
        "keller, sqrt(max(1, rows / columns)).",
    )
    split_qkv: bool = Field(
        default=True,
        description="Treat queries, keys and values as matrices of their own, not as one.",
    )
    split_gate_up: bool = Field(
        default=True,
        description="Treat the gate of SwiGLU and its other input as matrices of their own.",
    )
    beta1: Probability = Field(default=0.9, description="AdamW: decay of the first moment.")
    beta2: Probability = Field(default=0.95, description="AdamW: decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW: added to the denominator.")
    weight_decay: NonNegativeFloat = Field(
        default=0.1,
        description="Decoupled weight decay of both; norm weights and biases are exempt.",
    )
    embedding_lr_factor: PositiveFloat = Field(
        default=1.0, description="lr of the input embedding, and of tied weights, as a share of lr."
    )
    output_lr_factor: PositiveFloat = Field(
        default=1.0, description="lr of an output layer of its own, as a share of lr."
    )
    vector_lr_factor: PositiveFloat = Field(
        default=1.0, description="lr of norm weights and biases, as a share of lr."
    )

    whole_roles: ClassVar[tuple[ParameterRole, ...]] = ("hidden",)

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Makes it, for any layout and ZeRO stage."""
        # Imported here, for it brings PyTorch.
        from megatron_mdm.training.muon_steps import Muon

        return Muon(groups, self)

    def initial_state_of(
        self, role: ParameterRole, parameter: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The running gradient of hidden matrices, and what Adam keeps of the others."""
        import torch

        if role == "hidden":
            return {"momentum_buffer": torch.zeros_like(parameter, dtype=torch.float32)}
        return make_adam_state(parameter)

    def splits(self, parameter: OptimizedParameter) -> bool:
        """Are the matrices that a parameter is made of treated one by one?"""
        chosen = {"query": self.split_qkv, "gate": self.split_gate_up}
        return any(chosen.get(name, False) for name in parameter.matrices)
