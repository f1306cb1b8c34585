"""float32 weights and Adam moments of each parameter, behind any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from megatron_mdm.checkpoint.storage import MOMENTS, WEIGHT


class OptimizerStates:
    """Reads and writes the optimizer's state one parameter at a time.

    Every data-parallel rank must call the same methods in the same order: ZeRO gathers.

    Attributes:
        zero_stage: The run's ZeRO stage.

    Args:
        optimizer: What `deepspeed.initialize` returned, before its first step.
        zero_stage: The run's ZeRO stage, 0 to 3.
    """

    def __init__(self, optimizer: Any, zero_stage: int) -> None:
        self.zero_stage = zero_stage
        self._optimizer = optimizer
        self._sharded = zero_stage > 0
        self._adam = optimizer.optimizer if self._sharded else optimizer
        self._create_moments()

    def get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        """State of a parameter.

        Args:
            parameter: A local parameter.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.

        Returns:
            Of the parameter's local shape, on its device. Without ZeRO it is the state itself, so
            the next step changes it: copy what has to last.
        """
        value: Tensor
        if not self._sharded:
            value = parameter if kind == WEIGHT else self._optimizer.state[parameter][kind]
        elif kind == WEIGHT:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        return value.detach()

    def set(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        """Replaces the state of a parameter.

        Args:
            parameter: A local parameter.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
            value: float32, of the parameter's local shape.
        """
        value = value.to(parameter.device)
        if not self._sharded:
            target = parameter if kind == WEIGHT else self._optimizer.state[parameter][kind]
            target.data.copy_(value)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def set_step(self, step: int) -> None:
        """Sets the count that Adam's bias correction uses.

        Args:
            step: Optimizer steps taken.
        """
        for state in self._adam.state.values():
            state["step"].fill_(float(step))

    def _create_moments(self) -> None:
        # Adam would make them at its first step. ZeRO-1 and 2 link them to parameters after the
        # first of several groups has stepped, and so would never find those of the others.
        for group, parameters in zip(self._adam.param_groups, self._flat_groups(), strict=True):
            for flat in parameters:
                device = flat.device if group.get("fused") else "cpu"
                self._adam.state[flat] = {
                    "step": torch.tensor(0.0, device=device),
                    **{kind: torch.zeros_like(flat, dtype=torch.float32) for kind in MOMENTS},
                }
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat_groups(self) -> list[list[Tensor]]:
        optimizer = self._optimizer
        if not self._sharded:
            return [group["params"] for group in self._adam.param_groups]
        for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, attribute):
                return [[flat] for flat in getattr(optimizer, attribute)]
        # ZeRO-3 steps one sub-group at a time, each under the settings of its param group.
        groups: list[list[Tensor]] = [[] for _ in self._adam.param_groups]
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            groups[optimizer.sub_group_to_group_id[index]].append(flat)
        return groups
