"""float32 weights and optimizer states of each parameter, under any ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from megatron_mdm.checkpoint.flat_tensors import list_flat_tensors
from megatron_mdm.checkpoint.manifest import WEIGHT
from megatron_mdm.config import OptimizerConfig
from megatron_mdm.config.parameter_groups import ROLES
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.model.shards import NamedShard

# Elements that change places at once, so that memory need not hold a second copy of a piece.
_EXCHANGED_ELEMENTS = 2**24


class OptimizerStates:
    """Reads and writes the optimizer's state one parameter at a time.

    Every data-parallel rank must call the same methods in the same order: ZeRO gathers.

    Attributes:
        zero_stage: The run's ZeRO stage.
        names: What is kept of parameters besides their weights, in their shapes.
        by_role: The same of a role of which not all of it is kept.

    Args:
        optimizer: What `deepspeed.initialize` returned, before its first step.
        zero_stage: The run's ZeRO stage, 0 to 3.
        section: Makes the states, and names them.
        shards: This rank's parameters.
    """

    def __init__(
        self,
        optimizer: Any,
        zero_stage: int,
        section: OptimizerConfig,
        shards: Sequence[NamedShard],
    ) -> None:
        self.zero_stage = zero_stage
        self._optimizer = optimizer
        self._sharded = zero_stage > 0
        self._base = optimizer.optimizer if self._sharded else optimizer
        roles = {id(shard.parameter): shard.role for shard in shards}
        # Optimizers make their states at the first step. ZeRO-1 and 2 link them to parameters once
        # the first of several groups has stepped, and would miss the states of the other groups.
        flats = list_flat_tensors(optimizer, zero_stage)
        self._flats = [flat.tensor for flat in flats]
        for flat in flats:
            role = roles[id(flat.parameters[0])]
            self._base.state[flat.tensor] = section.initial_state_of(role, flat.tensor)
        link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        # Of all roles, so that every stage says the same.
        self.names = tuple(section.list_all_state_names())
        named = {role: tuple(section.list_state_names(role)) for role in ROLES}
        self.by_role = {role: names for role, names in named.items() if names != self.names}

    def list_kinds(self, shard: NamedShard) -> tuple[str, ...]:
        """What there is of a parameter: `weight`, and the names of its states."""
        return (WEIGHT, *self.by_role.get(shard.role, self.names))

    def get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        """State of a parameter.

        Returns:
            Of the parameter's local shape, on its device. Without ZeRO it is the state itself, so
            the next step changes it: copy what has to last.
        """
        value: Tensor
        if not self._sharded:
            value = parameter if kind == WEIGHT else self._base.state[parameter][kind]
        elif kind == WEIGHT:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        return value.detach()

    def set(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        """Replaces the state of a parameter.

        Args:
            parameter: A local parameter.
            kind: `weight`, or one of `names`.
            value: float32, of the parameter's local shape.
        """
        value = value.to(parameter.device)
        if not self._sharded:
            target = parameter if kind == WEIGHT else self._base.state[parameter][kind]
            target.data.copy_(value)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def get_numbers(self) -> dict[str, float]:
        """States that are one number, the same for every parameter, such as a count of steps.

        Raises:
            CheckpointError: They differ from one parameter to another.
        """
        found: dict[str, float] = {}
        for name, value in self._list_numbers():
            number = float(value)
            if found.setdefault(name, number) != number:
                raise CheckpointError(
                    f"The optimizer's {name} is {found[name]} for one parameter and {number} for "
                    "another, and a checkpoint keeps one for all: let the optimizer keep it as a "
                    "tensor of the parameter's shape."
                )
        return found

    def set_numbers(self, numbers: Mapping[str, float]) -> None:
        """Sets the states that are one number."""
        for name, value in self._list_numbers():
            if name in numbers:
                value.fill_(numbers[name])

    def list_pieces(self) -> list[Tensor]:
        """The float32 weights as this rank keeps them: its parameters, or under ZeRO flat pieces.

        Returns:
            The optimizer's own tensors, which each step changes. All ranks together hold every
            weight; between them and padding no weight is told apart.
        """
        return [flat.detach() for flat in self._flats]

    @contextlib.contextmanager
    def exchange(self, pieces: Sequence[Tensor]) -> Iterator[None]:
        """Lets float32 weights and others change places: `get` and `set` speak of the others.

        What the model computes with stays as it is, but without ZeRO, where it is the same.

        Args:
            pieces: float32, in the shapes of `list_pieces`. After the context they hold what `set`
                made of them, and the weights what they were, bit for bit.
        """
        self._exchange(pieces)
        try:
            yield
        finally:
            self._exchange(pieces)

    @contextlib.contextmanager
    def run_with(self, pieces: Sequence[Tensor]) -> Iterator[None]:
        """Lets the model compute with other weights. Every rank enters and leaves: ZeRO gathers.

        No step may be taken meanwhile. After an error, which ends a run, the model keeps the other
        weights: a rank that failed alone must not wait for others.

        Args:
            pieces: float32, in the shapes of `list_pieces`.
        """
        with self.exchange(pieces):
            self._refresh_model()
            yield
        self._refresh_model()

    @torch.no_grad()
    def _exchange(self, pieces: Sequence[Tensor]) -> None:
        for own, other in zip(self.list_pieces(), pieces, strict=True):
            parts = (piece.view(-1).split(_EXCHANGED_ELEMENTS) for piece in (own, other))
            for part, beside in zip(*parts, strict=True):
                kept = part.clone()
                part.copy_(beside)
                beside.copy_(kept)

    @torch.no_grad()
    def _refresh_model(self) -> None:
        """Hands the float32 weights to the model, rounded to its dtype, as a step does."""
        if not self._sharded:
            return
        if self.zero_stage < 3:
            self._optimizer.update_lp_params()
            return
        # Weights that are gathered at the moment are let go; small ones are gathered for good.
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer.checkpoint_event_epilogue()

    def _list_numbers(self) -> Iterator[tuple[str, Tensor]]:
        for state in self._base.state.values():
            yield from ((name, value) for name, value in state.items() if not value.dim())
