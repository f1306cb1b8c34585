"""What an optimizer is told of the parameters that it is built for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    # For types alone: a configuration is read before the engines are imported, which takes seconds.
    import torch

# What a parameter is in the network: a matrix between hidden states, the input embedding, the
# output layer, or a norm weight or bias.
ParameterRole = Literal["hidden", "embedding", "output", "vector"]
ROLES: tuple[ParameterRole, ...] = get_args(ParameterRole)


@dataclass(frozen=True, eq=False)
class OptimizedParameter:
    """A parameter as an optimizer sees it.

    Attributes:
        name: Global name, the same under every layout.
        role: What it is in the network.
        decays: Takes part in weight decay.
        shape: Of the whole.
        tensor: What this rank holds of it; under ZeRO-3 it may be empty between uses.
        rows: Its rows, if it is made of several matrices: which matrix, and how many rows of it
            come next.
        matrices: What these matrices are, by number: `query`, `key`, `value`; `gate`, `up`.
    """

    name: str
    role: ParameterRole
    decays: bool
    shape: tuple[int, ...]
    tensor: torch.nn.Parameter
    rows: tuple[tuple[int, int], ...] = ()
    matrices: tuple[str, ...] = ()


class Piece(NamedTuple):
    """Elements of a parameter within a tensor that an optimizer steps.

    Attributes:
        parameter: Whose.
        start: The first of them in what this rank holds of the parameter, flattened.
        numel: How many.
        offset: Where they begin in the tensor, flattened.
    """

    parameter: OptimizedParameter
    start: int
    numel: int
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of the tensor, or of one in its shape such as its gradient."""
        return tensor.view(-1).narrow(0, self.offset, self.numel)


class WholeParameters:
    """Looks through the layout: what lies in a tensor, and whole parameters.

    Under ZeRO 1 to 3 an optimizer steps flat tensors, each with pieces of several parameters, and
    under tensor parallelism a rank holds a part of each. This one is for parameters that nothing
    divides.

    Args:
        parameters: All of them.
    """

    def __init__(self, parameters: Sequence[OptimizedParameter]) -> None:
        self._parameters = {id(one.tensor): one for one in parameters}

    def list_pieces(self, tensor: torch.Tensor) -> Sequence[Piece]:
        """Lists the pieces of parameters in a tensor that the optimizer steps, in order."""
        parameter = self._parameters[id(tensor)]
        return [Piece(parameter, 0, tensor.numel(), 0)]

    def replace(
        self,
        tensors: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        function: Callable[[OptimizedParameter, torch.Tensor], torch.Tensor],
    ) -> None:
        """Replaces values by a function of those of whole parameters.

        Every rank of a pipeline stage calls it for the same parameters. The function is called for
        each parameter on one of them, or, where each has all of it anyway, on every one.

        Args:
            tensors: What the optimizer steps.
            values: Of each tensor, in its shape: momentum, for instance. They are overwritten.
            function: From a parameter and its whole values, in the parameter's shape, to new ones;
                the same wherever it is called.
        """
        for tensor, value in zip(tensors, values, strict=True):
            value.copy_(function(self._parameters[id(tensor)], value))


@dataclass(frozen=True)
class ParameterGroups:
    """What an optimizer is built for: the parameters that this rank holds.

    Attributes:
        parameters: All of them, in the order of a forward pass.
        wholes: Whole parameters, in the optimizer's `step`.
    """

    parameters: Sequence[OptimizedParameter]
    wholes: WholeParameters

    @property
    def matrices(self) -> list[torch.nn.Parameter]:
        """Those that weight decay is for."""
        return [one.tensor for one in self.parameters if one.decays]

    @property
    def vectors(self) -> list[torch.nn.Parameter]:
        """Norm weights and biases."""
        return [one.tensor for one in self.parameters if not one.decays]
