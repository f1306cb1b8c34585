"""Gradients of many micro batches, added up in float32 whatever their dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Float32GradientSums:
    """Adds up what each backward pass leaves in `grad`.

    Under a pipeline DeepSpeed leaves gradients where autograd adds them up, in the dtype of the
    weights. In bfloat16 the sum of n micro batches then is off by the order of sqrt(n) / 512: each
    addition rounds to eight bits. Here it is rounded once, when it is handed over.

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
