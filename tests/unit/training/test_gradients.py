"""Gradients of many micro batches lose nothing on the way to their sum."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_mdm.training.gradients import Float32GradientSums, spoil_infinite_loss


def gradients_of(layer: nn.Linear, number: int):
    """Gradients of so many backward passes, each by itself."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        inputs = torch.randn(4, 8, generator=generator).to(layer.weight.dtype)
        layer(inputs).square().mean().backward()
        yield layer.weight.grad


def test_sums_are_rounded_once():
    torch.manual_seed(1)
    layer = nn.Linear(8, 16, bias=False).bfloat16()
    exact = torch.zeros(16, 8, dtype=torch.float64)
    for grad in gradients_of(layer, 200):
        exact += grad.double()
        layer.weight.grad = None
    for _ in gradients_of(layer, 200):
        pass
    added_by_autograd = layer.weight.grad.clone()
    layer.weight.grad = None

    sums = Float32GradientSums(layer.parameters())
    assert all(grad is None for grad in gradients_of(layer, 200))
    sums.hand_over()
    assert layer.weight.grad.dtype == torch.bfloat16
    # Half a unit of eight bits, and what 200 sums of 24 bits add.
    assert ((layer.weight.grad - exact).abs() <= exact.abs() * (2**-8 + 1e-5) + 1e-6).all()
    assert ((added_by_autograd - exact).abs() > exact.abs() * 2**-7).any()

    layer.weight.grad = None
    assert all(grad is None for grad in gradients_of(layer, 1))
    sums.hand_over()
    single = layer.weight.grad
    assert single.double().norm() < exact.norm() / 10


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    logits = torch.zeros(4, requires_grad=True)
    target = torch.tensor(0)

    def of_the_masked_token():
        masked = logits.masked_fill(torch.tensor([True, False, False, False]), -math.inf)
        return torch.nn.functional.cross_entropy(masked, target)

    loss = of_the_masked_token()
    assert math.isinf(loss.item())
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()
    loss = spoil_infinite_loss(of_the_masked_token())
    assert not math.isfinite(loss.item())
    assert torch.isnan(torch.autograd.grad(loss, logits)[0]).any()

    finite = [torch.nn.functional.cross_entropy(logits, target) for _ in range(2)]
    assert torch.equal(spoil_infinite_loss(finite[0]), finite[0])
    (expected,) = torch.autograd.grad(finite[0], logits)
    assert torch.equal(torch.autograd.grad(spoil_infinite_loss(finite[1]), logits)[0], expected)
