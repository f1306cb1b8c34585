"""The language-model head: cross-entropy over the vocabulary at the positions that count.

Positions of weight 0 are left out before the output matrix is applied: in masked diffusion that is
half of them. The mask token and the padding rows of the vocabulary take part in no softmax.

Shapes: B batch, H hidden, M positions that count, C of them in a chunk, V this rank's part of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.model.loss_heads import LossHead
from megatron_mdm.model.vocabulary import LocalTargets, VocabularySlice

_LOGIT_BYTES = 4
# Float32 logits of one chunk of positions. On two cores a chunk of 512 rows by 32,000 tokens is
# large enough for full matmul speed; a GPU wants more rows.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}


class Predictions(NamedTuple):
    """The M positions of a micro batch whose tokens the loss asks for.

    Attributes:
        targets_M: int64 [M], token ids.
        weights_M: float32 [M], weight of each cross-entropy.
        sequence_M: int64 [M], the sequence b that each belongs to.
        num_sequences: Sequences B.
        inputs_M: int64 [M], what the model sees there; None where nobody told.
        more: What else the objective tells of each position, by name, float32 [M].
    """

    targets_M: Tensor
    weights_M: Tensor
    sequence_M: Tensor
    num_sequences: int
    inputs_M: Tensor | None = None
    more: Mapping[str, Tensor] = MappingProxyType({})

    def take(self, chunk: slice) -> Predictions:
        """Those of some of the positions."""
        return Predictions(
            self.targets_M[chunk],
            self.weights_M[chunk],
            self.sequence_M[chunk],
            self.num_sequences,
            None if self.inputs_M is None else self.inputs_M[chunk],
            {name: values_M[chunk] for name, values_M in self.more.items()},
        )


class ChunkLoss(Protocol):
    """The loss of a chunk of positions, and its gradient."""

    def __call__(
        self,
        logits_CV: Tensor,
        predictions: Predictions,
        rows: VocabularySlice,
        *,
        needs_gradient: bool,
    ) -> Tensor:
        """Computes the losses.

        Args:
            logits_CV: float32 [C, V], of this rank's columns; overwritten, by the gradient of each
                loss by its logits if that is needed.
            predictions: Of the chunk's positions.
            rows: What the columns stand for.
            needs_gradient: Does anybody ask for it?

        Returns:
            float32 [C], nats, not weighted.
        """


class ChunkedLinearLoss(torch.autograd.Function):
    """The output matrix and a loss over its split vocabulary, a chunk of rows at a time.

    No more than a chunk's logits exist at once. The forward pass computes the gradients together
    with the losses, while the logits are there, for a gradient of 1 on every loss; the backward
    pass scales them. So they are right for the sum or mean of the losses, which training uses; for
    losses weighted unevenly they are set to NaN.

    Source:
        Hsu et al. 2024, "Liger Kernel" (chunks, gradients in the forward pass).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        predictions: Predictions,
        rows: VocabularySlice,
        chunk_bytes: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        """Computes the losses, and the gradients that are needed.

        Args:
            ctx: Autograd context.
            hidden_MH: float [M, H], equal on all tensor-parallel ranks. Its gradient is this
                rank's part of a sum over them.
            weight_VH: float [V, H], this rank's rows of the output matrix.
            predictions: What the rows of `hidden_MH` should predict.
            rows: What the rows of `weight_VH` stand for.
            chunk_bytes: Most bytes of the float32 logits of a chunk; at least one row is taken.
            chunk_loss: What is computed of the logits of a chunk.

        Returns:
            Weighted losses of each sequence, float32 [B], nats.
        """
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_MH = torch.empty_like(hidden_MH) if needs_hidden else None
        # In float32 from chunk to chunk, whatever the dtype of the products.
        grad_VH = torch.empty_like(weight_VH, dtype=torch.float32) if needs_weight else None
        if grad_VH is not None and not len(hidden_MH):
            grad_VH.zero_()
        losses_B = hidden_MH.new_zeros(predictions.num_sequences, dtype=torch.float32)
        chunk_rows = max(chunk_bytes // (_LOGIT_BYTES * weight_VH.shape[0]), 1)
        for start in range(0, hidden_MH.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden_CH, part = hidden_MH[chunk], predictions.take(chunk)
            logits_CV, weight_C = F.linear(hidden_CH, weight_VH).float(), part.weights_M
            needs_gradient = needs_hidden or needs_weight
            loss_C = chunk_loss(logits_CV, part, rows, needs_gradient=needs_gradient)
            losses_B.index_add_(0, part.sequence_M, loss_C * weight_C)
            if not needs_gradient:
                continue
            grad_CV = logits_CV.mul_(weight_C[:, None]).to(weight_VH.dtype)
            if grad_MH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_MH[chunk])
            if grad_VH is not None:
                _add_product(grad_VH, grad_CV, hidden_CH, is_first=start == 0)
        ctx.save_for_backward(grad_MH, grad_VH)
        ctx.weight_dtype = weight_VH.dtype
        return losses_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients.

        Args:
            ctx: Autograd context.
            *grads: float32 [B], equal numbers.

        Returns:
            Gradients of the hidden states [M, H] and of the output matrix [V, H].
        """
        (grad_B,) = grads
        grad_MH, grad_VH = ctx.saved_tensors
        # Compared on the device, so that the host need not wait.
        scale = torch.where((grad_B == grad_B[0]).all(), grad_B[0], torch.nan)
        # In place: the weight's gradient is as large as the weight, and asked for once.
        grad_MH = None if grad_MH is None else grad_MH.mul_(scale)
        grad_VH = None if grad_VH is None else grad_VH.mul_(scale).to(ctx.weight_dtype)
        return grad_MH, grad_VH, None, None, None, None


def cross_entropy_of_chunk(
    logits_CV: Tensor,
    predictions: Predictions,
    rows: VocabularySlice,
    *,
    needs_gradient: bool,
    z_loss: float = 0.0,
) -> Tensor:
    """The cross-entropy, as `ChunkLoss` says.

    Args:
        logits_CV: As there.
        predictions: As there.
        rows: As there.
        needs_gradient: As there.
        z_loss: Weight c of a penalty c log(Z)^2 at each position beside its cross-entropy, with Z
            the softmax's denominator. The gradients have it, the losses have not.

    Returns:
        float32 [C], nats.
    """
    targets_C = LocalTargets.locate(predictions.targets_M, rows)
    nll_C = _softmax_in_place(logits_CV, targets_C, rows, z_loss)
    if needs_gradient:
        targets_C.subtract_one_hot(logits_CV)
    return nll_C


def _softmax_in_place(
    logits_CV: Tensor, targets_C: LocalTargets, rows: VocabularySlice, z_loss: float
) -> Tensor:
    """Turns float32 logits into probabilities over all ranks' columns.

    Args:
        logits_CV: float32 [C, V], overwritten.
        targets_C: Where the targets are.
        rows: What the columns stand for.
        z_loss: c of c log(Z)^2. Its gradient, 2 c log(Z) times the probabilities, is added to them,
            which then no longer sum to 1.

    Returns:
        Cross-entropy of each row, float32 [C], nats.
    """
    rows.exclude(logits_CV)
    highest_C = rows.reduce(logits_CV.amax(dim=-1), dist.ReduceOp.MAX)
    logits_CV.sub_(highest_C[:, None])
    score_C = targets_C.select(logits_CV)
    logits_CV.exp_()
    # One message for both sums.
    sums_2C = rows.reduce(torch.stack([score_C, logits_CV.sum(dim=-1)]), dist.ReduceOp.SUM)
    score_C, total_C = sums_2C.unbind()
    if z_loss:
        log_sum_C = total_C.log() + highest_C
        logits_CV.mul_(((1.0 + 2.0 * z_loss * log_sum_C) / total_C)[:, None])
    else:
        logits_CV.div_(total_C[:, None])
    return total_C.log() - score_C


def _add_product(sum_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, *, is_first: bool) -> None:
    if grad_CV.dtype != sum_VH.dtype:
        product_VH = grad_CV.T @ hidden_CH
        _ = sum_VH.copy_(product_VH) if is_first else sum_VH.add_(product_VH)
    elif is_first:
        torch.mm(grad_CV.T, hidden_CH, out=sum_VH)
    else:
        sum_VH.addmm_(grad_CV.T, hidden_CH)


def compute_in_chunks(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    predictions: Predictions,
    rows: VocabularySlice,
    chunk_loss: ChunkLoss,
) -> Tensor:
    """Computes a loss as `ChunkedLinearLoss` does, in chunks that suit the device."""
    chunk_bytes = CHUNK_BYTES[hidden_MH.device.type]
    return ChunkedLinearLoss.apply(hidden_MH, weight_VH, predictions, rows, chunk_bytes, chunk_loss)


class CrossEntropy(LossHead):
    """The cross-entropy, a chunk of positions at a time.

    Args:
        z_loss: As for `cross_entropy_of_chunk`.
    """

    def __init__(self, z_loss: float = 0.0) -> None:
        self._z_loss = z_loss

    def __call__(
        self, hidden_MH: Tensor, weight_VH: Tensor, predictions: Predictions, rows: VocabularySlice
    ) -> Tensor:
        """As `ChunkedLinearLoss`, whose gradients are those of the sum or mean of the losses."""
        chunk_loss = partial(cross_entropy_of_chunk, z_loss=self._z_loss)
        return compute_in_chunks(hidden_MH, weight_VH, predictions, rows, chunk_loss)


CROSS_ENTROPY = CrossEntropy()
