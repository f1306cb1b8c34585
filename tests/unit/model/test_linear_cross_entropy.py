"""The chunked head against torch's own cross-entropy over all logits, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.model.head import ChunkedLinearLoss, Predictions, cross_entropy_of_chunk
from megatron_mdm.model.vocabulary import VocabularySlice

VOCAB, ROWS, WIDTH, BATCH = 13, 16, 6, 3


def inputs(num_positions: int, mask_token_id: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_positions)
    hidden = torch.randn(num_positions, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    real = torch.tensor([i for i in range(VOCAB) if i != mask_token_id])
    predictions = Predictions(
        targets_M=real[torch.randint(len(real), (num_positions,), generator=generator)],
        weights_M=torch.rand(num_positions, generator=generator),
        sequence_M=torch.randint(BATCH, (num_positions,), generator=generator),
        num_sequences=BATCH,
    )
    rows = VocabularySlice(0, ROWS, VOCAB, mask_token_id, None)
    return hidden.to(dtype), weight.to(dtype), predictions, rows


def compute(hidden, weight, predictions, rows, chunk_bytes, z_loss=0.0):
    chunk_loss = partial(cross_entropy_of_chunk, z_loss=z_loss)
    return ChunkedLinearLoss.apply(hidden, weight, predictions, rows, chunk_bytes, chunk_loss)


def plain(hidden: Tensor, weight: Tensor, predictions: Predictions, mask_token_id: int) -> Tensor:
    hidden, weight = hidden.double(), weight.double()
    logits = F.linear(hidden, weight)[:, :VOCAB]
    if mask_token_id < VOCAB:
        logits = logits.index_fill(1, torch.tensor([mask_token_id]), -torch.inf)
    nll = F.cross_entropy(logits, predictions.targets_M, reduction="none")
    losses = torch.zeros(BATCH, dtype=torch.float64)
    return losses.index_add(0, predictions.sequence_M, nll * predictions.weights_M.double())


def penalties_of(
    hidden: Tensor, weight: Tensor, predictions: Predictions, mask_token_id: int
) -> Tensor:
    """Of each sequence the weighted squares of the log of the softmax's denominator."""
    columns = [token for token in range(VOCAB) if token != mask_token_id]
    log_sum = F.linear(hidden.double(), weight.double())[:, columns].logsumexp(1)
    penalties = torch.zeros(BATCH, dtype=torch.float64)
    weighted = log_sum.square() * predictions.weights_M.double()
    return penalties.index_add(0, predictions.sequence_M, weighted)


def gradients(losses: Tensor, *leaves: Tensor, scale: float = 0.7):
    return torch.autograd.grad(losses.mean() * scale, leaves)


@pytest.mark.parametrize("mask_token_id", [VOCAB, 4, ROWS - 1, ROWS])
@pytest.mark.parametrize("num_positions", [0, 1, 7, 8])
@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 100])
def test_losses_and_gradients_are_those_of_all_logits(num_positions, chunk_rows, mask_token_id):
    hidden, weight, predictions, rows = inputs(num_positions, mask_token_id)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    losses = ChunkedLinearLoss.apply(
        *leaves, predictions, rows, 4 * ROWS * chunk_rows, cross_entropy_of_chunk
    )
    expected = plain(*leaves, predictions, mask_token_id)
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(losses, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask_token_id", [VOCAB, 4])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_the_z_loss_is_in_the_gradients_and_not_in_the_losses(z_loss, chunk_rows, mask_token_id):
    hidden, weight, predictions, rows = inputs(8, mask_token_id)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    losses = compute(*leaves, predictions, rows, 4 * ROWS * chunk_rows, z_loss)
    cross_entropies = plain(*leaves, predictions, mask_token_id)
    torch.testing.assert_close(losses.double(), cross_entropies, atol=1e-6, rtol=1e-5)
    expected = cross_entropies + z_loss * penalties_of(*leaves, predictions, mask_token_id)
    for ours, theirs in zip(gradients(losses, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_rows_that_no_token_uses_get_no_gradient_and_change_nothing():
    hidden, weight, predictions, rows = inputs(8, ROWS)
    # Far larger than any other, if they counted.
    weight[VOCAB:] *= 100
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    losses = ChunkedLinearLoss.apply(
        *leaves, predictions, rows, 4 * ROWS * 3, cross_entropy_of_chunk
    )
    _, grad = gradients(losses, *leaves)
    assert (grad[VOCAB:] == 0.0).all()
    assert (grad[:VOCAB] != 0.0).any(dim=1).all()
    without = weight.detach()[:VOCAB].requires_grad_()
    few = VocabularySlice(0, VOCAB, VOCAB, ROWS, None)
    expected = ChunkedLinearLoss.apply(
        hidden, without, predictions, few, 4 * VOCAB * 3, cross_entropy_of_chunk
    )
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        grad[:VOCAB], gradients(expected, hidden, without)[1], rtol=1e-5, atol=1e-7
    )


def test_bfloat16_sums_the_weight_gradient_in_float32():
    hidden, weight, predictions, rows = inputs(4000, VOCAB, torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = gradients(plain(*leaves, predictions, VOCAB), *leaves)
    fine = ChunkedLinearLoss.apply(
        *leaves, predictions, rows, 4 * ROWS * 10, cross_entropy_of_chunk
    )
    _, grad = gradients(fine, *leaves)
    # Of 400 chunks: rounded to bfloat16 after each, the sum would be off by a hundredth.
    error = (grad - expected[1]).norm() / expected[1].norm()
    assert error < 0.004


@pytest.mark.parametrize("which", ["hidden", "weight", "nothing"])
def test_only_gradients_that_are_asked_for_are_made(which):
    hidden, weight, predictions, rows = inputs(5, VOCAB)
    hidden.requires_grad_(which == "hidden")
    weight.requires_grad_(which == "weight")
    losses = compute(hidden, weight, predictions, rows, 128)
    if which == "nothing":
        assert not losses.requires_grad
        return
    losses.sum().backward()
    found, other = (hidden, weight) if which == "hidden" else (weight, hidden)
    assert other.grad is None
    expected = plain(hidden, weight, predictions, VOCAB).sum()
    torch.testing.assert_close(found.grad, torch.autograd.grad(expected, found)[0])


def test_uneven_weights_of_the_losses_give_no_number_rather_than_a_wrong_one():
    hidden, weight, predictions, rows = inputs(5, VOCAB)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    losses = compute(*leaves, predictions, rows, 128)
    for gradient in torch.autograd.grad(losses[0] + 2 * losses[1:].sum(), leaves):
        assert gradient.isnan().all()


def test_gradients_asked_for_twice_are_refused_rather_than_scaled_twice():
    hidden, weight, predictions, rows = inputs(5, VOCAB)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = ChunkedLinearLoss.apply(
        *leaves, predictions, rows, 4 * ROWS * 2, cross_entropy_of_chunk
    ).mean()
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)
