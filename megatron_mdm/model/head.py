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

_LOGIT_BYTES = 4
# Float32 logits of one chunk of positions. On two cores a chunk of 512 rows by 32,000 tokens is
# large enough for full matmul speed; a GPU wants more rows.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}


class VocabularySlice:
    """Which token ids this rank's rows of the head stand for.

    Args:
        first_id: Token id of the first row.
        num_rows: Rows of this rank.
        vocab_size: Real tokens, V.
        mask_token_id: Id of the mask token, which must not be predicted.
        group: Tensor-parallel group, None for a single rank.

    Attributes:
        num_possible: Tokens that may be predicted, on all ranks together.
        mask_token_id: As given.
    """

    def __init__(
        self,
        first_id: int,
        num_rows: int,
        vocab_size: int,
        mask_token_id: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.num_possible = vocab_size - (mask_token_id < vocab_size)
        self.mask_token_id = mask_token_id
        self.first_id = first_id
        self.num_rows = num_rows
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        ids = range(first_id, first_id + num_rows)
        self._first_padding = min(max(vocab_size - first_id, 0), num_rows)
        self._mask_row = mask_token_id - first_id if mask_token_id in ids else None

    def exclude(self, logits_MV: Tensor) -> Tensor:
        """Makes the mask token and the padding rows impossible, in place.

        Args:
            logits_MV: float [..., V].

        Returns:
            The same tensor, -inf in those columns.
        """
        logits_MV[..., self._first_padding :] = -torch.inf
        if self._mask_row is not None:
            logits_MV[..., self._mask_row] = -torch.inf
        return logits_MV

    def logits(self, hidden_MH: Tensor, weight_VH: Tensor) -> Tensor:
        """Logits of this rank's columns, with their gradient.

        Args:
            hidden_MH: float [M, H].
            weight_VH: float [V, H].

        Returns:
            float32 [M, V], -inf where nothing may be predicted.
        """
        return self.exclude(F.linear(hidden_MH, weight_VH).float())

    def log_sum(self, logits_MV: Tensor) -> Tensor:
        """Log of the softmax's denominator over all ranks' columns, with its gradient.

        Args:
            logits_MV: float32 [M, V], of `logits`.

        Returns:
            float32 [M].
        """
        highest_M = self.reduce(logits_MV.detach().amax(dim=-1), dist.ReduceOp.MAX)
        total_M = (logits_MV - highest_M[:, None]).exp().sum(dim=-1)
        return self.sum(total_M).log() + highest_M

    def scores(self, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        """Logits of the targets, on whatever rank they are, with their gradient.

        Args:
            logits_MV: float32 [M, V], of `logits`.
            targets_M: int64 [M], token ids.

        Returns:
            float32 [M]; `log_sum` less this is the cross-entropy.
        """
        return self.sum(LocalTargets.locate(targets_M, self).select(logits_MV))

    def sum(self, part_M: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, with its gradient; `reduce` has none.

        Args:
            part_M: What this rank's columns contribute, such as a sum over them.

        Returns:
            The sum, equal on all of them.
        """
        return part_M if self.group is None else _SumOverRanks.apply(part_M, self.group)

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """All-reduces over the tensor-parallel ranks, in place.

        Args:
            tensor: Equal shape on all of them.
            op: Sum or maximum.

        Returns:
            The same tensor.
        """
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks that all have the same loss: the gradient of a part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part_M: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        total_M = part_M.clone()
        dist.all_reduce(total_M, group=group)
        return total_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


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


class LocalTargets(NamedTuple):
    """Columns of the targets on this rank.

    Attributes:
        columns_C: int64 [C], inside this rank's columns, wherever the target is.
        here_C: Bool [C], whether it is on this rank.
    """

    columns_C: Tensor
    here_C: Tensor

    @classmethod
    def locate(cls, targets_C: Tensor, rows: VocabularySlice) -> LocalTargets:
        """Locates token ids, int64 [C], among the columns of all ranks."""
        local_C = targets_C - rows.first_id
        here_C = (local_C >= 0) & (local_C < rows.num_rows)
        return cls(local_C.clamp(0, rows.num_rows - 1), here_C)

    def select(self, scores_CV: Tensor) -> Tensor:
        """Scores of the targets that are here, 0 for the others, [C]."""
        found_C = scores_CV.gather(-1, self.columns_C[:, None]).squeeze(-1)
        return torch.where(self.here_C, found_C, 0.0)

    def add(self, values_CV: Tensor, terms_C: Tensor) -> None:
        """Adds terms at the targets that are here, in place."""
        values_CV.scatter_add_(-1, self.columns_C[:, None], (terms_C * self.here_C)[:, None])

    def set(self, values_CV: Tensor, value: float) -> None:
        """Sets what stands at the targets that are here, in place."""
        kept_C = values_CV.gather(-1, self.columns_C[:, None])
        values_CV.scatter_(
            -1, self.columns_C[:, None], kept_C.masked_fill(self.here_C[:, None], value)
        )

    def subtract_one_hot(self, probabilities_CV: Tensor) -> None:
        """Subtracts 1 at the targets that are here, in place."""
        ones_C1 = self.here_C.to(probabilities_CV.dtype).neg()[:, None]
        probabilities_CV.scatter_add_(-1, self.columns_C[:, None], ones_C1)


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
