"""The best size for a budget: the least loss over all N with D = C / (6 N), or at its best epochs.

Letters: C budgets, G sizes of a grid, K constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.forms import Array, Law

# Training takes 6 FLOPs per parameter and token (forward 2, backward 4).
_FLOPS_PER_PARAMETER_TOKEN = 6.0
# Each closer look spans two steps of the grid before it: 1 / 32 of its width, so 5 looks narrow
# N to about 1e-6 of itself. A parabola's minimum is flat: the loss is then exact to 1e-12.
_GRID = 65
_LOOKS = 5


class Allocation(NamedTuple):
    """How to spend a budget.

    Attributes:
        num_parameters: N, as the law counts it.
        num_tokens: D, tokens trained on; fewer than the budget pays for where more would overfit.
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
    sizes_LC, losses_LC = best_sizes([law], [training_flops], unique_tokens)
    num_parameters = float(sizes_LC[0, 0])
    num_tokens = training_flops / _FLOPS_PER_PARAMETER_TOKEN / num_parameters
    best = law.best_epochs(num_parameters=num_parameters, unique_tokens=unique_tokens)
    num_tokens = min(num_tokens, unique_tokens * float(best))
    loss = float(losses_LC[0, 0])
    return Allocation(num_parameters, num_tokens, num_tokens / unique_tokens, loss)


def best_sizes(
    laws: Sequence[Law], flops_C: ArrayLike, unique_tokens: float
) -> tuple[Array, Array]:
    """The best sizes and losses for many budgets and laws.

    A run whose loss has a minimum in epochs ends there, though the budget should pay for more.

    Args:
        laws: At least one, all of one form.
        flops_C: [C], budgets 6 N D.
        unique_tokens: U.

    Returns:
        N and the losses in nats per token, float64 [laws, C] each.
    """
    form = type(laws[0])
    constants = np.array([law.values() for law in laws])[:, None, None]
    products_C1 = np.asarray(flops_C, dtype=np.float64)[:, None] / _FLOPS_PER_PARAMETER_TOKEN
    high = np.tile(np.log(products_C1), (len(laws), 1, 1))
    low = np.zeros_like(high)
    shares_G = np.linspace(0, 1, _GRID)
    for _ in range(_LOOKS):
        grid = low + (high - low) * shares_G
        sizes = np.exp(grid)
        tokens = products_C1 / sizes
        if form.penalty_names:
            # Nobody has to spend all of a budget on overfitting.
            best_log = form.log_best_epochs(constants, sizes, unique_tokens)
            tokens = np.minimum(tokens, unique_tokens * np.exp(best_log))
        losses = form.log_loss(constants, sizes, tokens, unique_tokens)
        best = losses.argmin(-1)[..., None]
        low, high = (
            np.take_along_axis(grid, np.clip(best + shift, 0, _GRID - 1), -1) for shift in (-1, 1)
        )
    sizes_LC, logs_LC = (np.take_along_axis(one, best, -1)[..., 0] for one in (sizes, losses))
    return sizes_LC, np.exp(logs_LC)
