"""The bound in chunks against autograd of its direct sums, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_mdm.diffusion.interpolating import CLEAN, UNIFORM
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise
from megatron_mdm.model.head import ChunkedLinearLoss, Predictions
from megatron_mdm.model.interpolating_head import bound_of_chunk
from megatron_mdm.model.vocabulary import VocabularySlice

N, ROWS, H, M = 11, 16, 6, 14
MASK = N
NOISES = [HybridNoise(N, 0.0), HybridNoise(N, 0.2, 2.0), UniformNoise(N), ShiftedNoise(N, 0.0)]
TIMES = (1e-4, 0.02, 0.4, 0.9, 1 - 1e-4)


def inputs(noise, t: float, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(M, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, H, generator=generator, dtype=torch.float64)
    clean = torch.arange(M) % N
    # A third each: masked, right, wrong.
    shown = torch.where(torch.arange(M) % 3 == 0, MASK, clean)
    shown = torch.where(torch.arange(M) % 3 == 1, (clean + 4) % N, shown)
    if isinstance(noise, UniformNoise):
        shown = torch.where(shown == MASK, (clean + 2) % N, shown)
    at = noise.at(t)
    if not at.uniform:
        shown = torch.where(shown == MASK, MASK, clean)
    weights = torch.where(shown == clean, at.right_weight, at.wrong_weight)
    weights = torch.where(shown == MASK, at.mask_weight, weights).to(dtype)
    chances = {
        name: torch.full((M,), value, dtype=torch.float64)
        for name, value in ((CLEAN, at.clean), (UNIFORM, at.uniform))
    }
    predictions = Predictions(clean, weights, torch.arange(M) % 2, 2, shown, chances)
    return hidden.to(dtype), weight.to(dtype), predictions


def direct(hidden, weight, noise, t: float, predictions):
    """The sums over all tokens and M, written out."""
    x_hat = F.linear(hidden, weight)[:, :N].softmax(-1)
    at = noise.at(t)
    end = at.mask * torch.ones(M, 1, dtype=hidden.dtype)
    q = torch.cat([at.clean * F.one_hot(predictions.targets_M, N).to(hidden) + at.uniform, end], 1)
    q_hat = torch.cat([at.clean * x_hat + at.uniform, end], 1)
    rows = torch.arange(M)
    ratio = q[rows, predictions.inputs_M] / q_hat[rows, predictions.inputs_M]
    terms = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - q_hat.clamp(min=1e-300).log()), 0.0)
    return terms.sum(-1) + ratio - 1 - ratio.log()


def compute(hidden, weight, predictions, num_rows=ROWS):
    rows = VocabularySlice(0, num_rows, N, MASK, None)
    size = 4 * num_rows * 4
    return ChunkedLinearLoss.apply(hidden, weight, predictions, rows, size, bound_of_chunk)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("t", TIMES)
def test_losses_and_gradients_are_those_of_the_direct_sums(noise, t, monkeypatch):
    # The head computes in float32 wherever it is used; here its arithmetic is looked at.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    hidden, weight, predictions = inputs(noise, t)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected_M = direct(*leaves, noise, t, predictions) * predictions.weights_M
    expected_M = torch.where(predictions.weights_M == 0, 0.0, expected_M)
    logits_MV = F.linear(hidden, weight).detach()
    rows = VocabularySlice(0, ROWS, N, MASK, None)
    found_M = bound_of_chunk(logits_MV, predictions, rows, needs_gradient=True)
    torch.testing.assert_close(found_M * predictions.weights_M, expected_M, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected_M.sum(), leaves)
    grad_MV = logits_MV * predictions.weights_M[:, None]
    found = grad_MV @ weight, grad_MV.T @ hidden
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("t", TIMES)
def test_float32_is_near_float64_at_all_times(noise, t):
    hidden, weight, predictions = inputs(noise, t, dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found_B = compute(*leaves, predictions)
    grads = torch.autograd.grad(found_B.sum(), leaves)
    wide = [one.detach().double().requires_grad_() for one in leaves]
    expected_M = direct(*wide, noise, t, predictions) * predictions.weights_M.double()
    expected_M = torch.where(predictions.weights_M == 0, 0.0, expected_M)
    wanted = torch.autograd.grad(expected_M.sum(), wide)
    expected_B = torch.zeros(2, dtype=torch.float64)
    expected_B.index_add_(0, predictions.sequence_M, expected_M.detach())
    torch.testing.assert_close(found_B.double(), expected_B, rtol=2e-5, atol=2e-5)
    for one, other in zip(grads, wanted, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=3e-5 * scale + 2e-6)


def test_masked_positions_without_uniform_noise_cost_their_cross_entropy_over_t():
    hidden, weight, predictions = inputs(NOISES[0], 0.3)
    found_M = bound_of_chunk(
        F.linear(hidden, weight),
        predictions,
        VocabularySlice(0, ROWS, N, MASK, None),
        needs_gradient=False,
    )
    logits_MV, clean_M = F.linear(hidden, weight)[:, :N], predictions.targets_M
    nll_M = F.cross_entropy(logits_MV, clean_M, reduction="none")
    expected_M = torch.where(predictions.inputs_M == MASK, nll_M / 0.3, 0.0)
    torch.testing.assert_close(found_M * predictions.weights_M, expected_M)


def test_the_penalty_on_the_denominator_is_in_the_gradients_alone():
    hidden, weight, predictions = inputs(NOISES[1], 0.4)
    rows = VocabularySlice(0, ROWS, N, MASK, None)
    logits_MV = F.linear(hidden, weight)
    plain_MV, found_MV, leaf_MV = logits_MV.clone(), logits_MV.clone(), logits_MV.requires_grad_()
    losses_M = bound_of_chunk(plain_MV, predictions, rows, needs_gradient=True)
    found_M = bound_of_chunk(found_MV, predictions, rows, needs_gradient=True, z_loss=0.3)
    torch.testing.assert_close(found_M, losses_M)
    (extra_MV,) = torch.autograd.grad(0.3 * leaf_MV[:, :N].logsumexp(-1).square().sum(), leaf_MV)
    torch.testing.assert_close(found_MV - plain_MV, extra_MV)


def test_the_size_of_chunks_changes_nothing():
    hidden, weight, predictions = inputs(NOISES[1], 0.4, dtype=torch.float32)
    rows = VocabularySlice(0, ROWS, N, MASK, None)
    one, other = (
        ChunkedLinearLoss.apply(hidden, weight, predictions, rows, size, bound_of_chunk)
        for size in (1, 10**6)
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_without_positions_the_losses_are_zero():
    hidden, weight, predictions = inputs(NOISES[1], 0.4, dtype=torch.float32)
    few = predictions.take(slice(0, 0))
    leaves = hidden[:0].requires_grad_(), weight.requires_grad_()
    losses_B = compute(*leaves, few)
    assert losses_B.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(losses_B.sum(), leaves)[1].any()
