"""Gradients of a step: summed in float32, and made NaN where the update is to be skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Float32GradientSums:
    """Sums the gradients of all backward passes of a step in float32.

    Under a pipeline autograd sums gradients in the dtype of the weights. In bfloat16, where each
    addition rounds to eight bits, the sum of n micro batches is off by the order of sqrt(n) / 512.
    Here the sum is rounded once, when it is handed over.

    Args:
        parameters: Whose gradients; from now on `grad` is None after each backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add)

    def hand_over(self) -> None:
        """Puts the sums into `grad`, in the dtype of the weights, and begins anew."""
        while self._sums:
            parameter, total = self._sums.popitem()
            parameter.grad = total.to(parameter.dtype)

    def _add(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        assert isinstance(parameter, nn.Parameter)
        assert grad is not None
        if parameter in self._sums:
            self._sums[parameter].add_(grad)
        else:
            self._sums[parameter] = grad.float()
        parameter.grad = None


def spoil_gradients(optimizer: Any) -> None:
    """Makes a sharded optimizer leave out its next update by its own rule.

    DeepSpeed leaves out a step whose global gradient norm is not finite, and tidies up after it;
    each ZeRO stage keeps its reduced gradients elsewhere.

    Args:
        optimizer: What `deepspeed.initialize` returned for ZeRO stage 1, 2 or 3, after the last
            backward of a step.
    """
    if hasattr(optimizer, "fp32_groups_gradients"):
        groups = optimizer.fp32_groups_gradients
    else:
        groups = list(optimizer.averaged_gradients.values())
    for gradients in groups:
        for gradient in gradients or ():
            if gradient is not None:
                gradient.fill_(math.nan)


def spoil_infinite_loss(loss: torch.Tensor) -> torch.Tensor:
    """Returns the same loss, with a gradient that is NaN where the loss is not finite.

    An infinite cross-entropy has a finite gradient, which would let the step pass.

    Args:
        loss: A scalar.

    Returns:
        The loss, bit for bit where it is finite.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
