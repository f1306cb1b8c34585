"""The best size for a budget: the least loss over all N with D = C / (6 N).

Letters: C budgets, G sizes of a grid, K constants.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.forms import Law

# Training takes 6 FLOPs a parameter and token (forward 2, backward 4).
_FLOPS_PER_PARAMETER_TOKEN = 6.0
# Each closer look spans two steps of the grid before it: 1 / 32 of its width, so 5 looks narrow
# N to about 1e-6 of itself. A parabola's minimum is flat: the loss is then exact to 1e-12.
_GRID = 65
_LOOKS = 5


class Allocation(NamedTuple):
    """How to spend a budget.

    Attributes:
        num_parameters: N, as the law counts it.
        num_tokens: D, tokens trained on.
        epochs: D / U; below 1 where the budget does not reach through the unique tokens.
        loss: What the law expects, nats per token.
    """

    num_parameters: float
    num_tokens: float
    epochs: float
    loss: float


def best_allocation(law: Law, *, training_flops: float, unique_tokens: float) -> Allocation:
    """The size and number of tokens that a law expects to be best.

    Args:
        law: Any law.
        training_flops: C = 6 N D, N as the law counts it.
        unique_tokens: U, how many different tokens there are.

    Returns:
        The best of all N, from one parameter to one token.

    Raises:
        DataError: A number is not positive and finite.
    """
    for name, value in (("training_flops", training_flops), ("unique_tokens", unique_tokens)):
        if not 0 < value < math.inf:
            raise DataError(f"{name}={value} is not valid: give a positive, finite number.")
    constants_K = torch.tensor(law.values(), dtype=torch.float64)
    flops_C = torch.tensor([training_flops], dtype=torch.float64)
    sizes_C, losses_C = best_sizes(type(law), constants_K, flops_C, unique_tokens)
    num_parameters = float(sizes_C)
    num_tokens = training_flops / _FLOPS_PER_PARAMETER_TOKEN / num_parameters
    return Allocation(num_parameters, num_tokens, num_tokens / unique_tokens, float(losses_C))


def best_sizes(
    form: type[Law], constants: Tensor, flops_C: Tensor, unique_tokens: float
) -> tuple[Tensor, Tensor]:
    """The best sizes and losses for many budgets and laws.

    Args:
        form: The form.
        constants: float64 [..., K].
        flops_C: float64 [C], budgets 6 N D.
        unique_tokens: U.

    Returns:
        N and the losses in nats per token, float64 [..., C] each.
    """
    constants = constants[..., None, None, :]
    products_C1 = (flops_C / _FLOPS_PER_PARAMETER_TOKEN)[:, None]
    unique = torch.tensor(unique_tokens, dtype=torch.float64)
    log_products_C = products_C1.log().expand(*constants.shape[:-3], -1, -1)[..., 0]
    low, high = torch.zeros_like(log_products_C), log_products_C
    shares_G = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    for _ in range(_LOOKS):
        grid = low[..., None] + (high - low)[..., None] * shares_G
        sizes = grid.exp()
        losses, best = form.log_loss(constants, sizes, products_C1 / sizes, unique).min(-1)
        low, high = (
            grid.gather(-1, (best + shift).clamp(0, _GRID - 1)[..., None])[..., 0]
            for shift in (-1, 1)
        )
        sizes = sizes.gather(-1, best[..., None])[..., 0]
    return sizes, losses.exp()
