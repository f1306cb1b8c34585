"""The language-model head: cross-entropy over the vocabulary at the positions that count.

Positions of weight 0 are left out before the output matrix is applied: in masked diffusion that is
half of them. The mask token and the padding rows of the vocabulary take part in no softmax.

Shapes: S sequence, B batch, H hidden, M positions that count, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class VocabularySlice:
    """Which token ids this rank's rows of the head stand for.

    Args:
        first_id: Token id of the first row.
        num_rows: Rows of this rank.
        vocab_size: Real tokens, V.
        mask_token_id: Id of the mask token, which must not be predicted.
        group: Tensor-parallel group, None for a single rank.
    """

    def __init__(
        self,
        first_id: int,
        num_rows: int,
        vocab_size: int,
        mask_token_id: int,
        group: dist.ProcessGroup | None,
    ) -> None:
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


class VocabularyParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary that is split over tensor-parallel ranks, in float32."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor, rows: VocabularySlice) -> Tensor:
        """Computes the losses.

        Args:
            ctx: Autograd context.
            logits_MV: float [M, V], this rank's columns.
            targets_M: int64 [M], global token ids.
            rows: What the columns stand for.

        Returns:
            float32 [M], nats.
        """
        scores_MV = rows.exclude(logits_MV.float().clone())
        if scores_MV.shape[0] == 0:
            ctx.save_for_backward(scores_MV, targets_M)
            ctx.rows, ctx.dtype = rows, logits_MV.dtype
            return scores_MV.new_zeros(0)
        highest_M = rows.reduce(scores_MV.amax(dim=-1), dist.ReduceOp.MAX)
        scores_MV -= highest_M.unsqueeze(-1)
        local_M = targets_M - rows.first_id
        here_M = (local_M >= 0) & (local_M < rows.num_rows)
        local_M = local_M.clamp(0, rows.num_rows - 1)
        score_M = scores_MV.gather(-1, local_M.unsqueeze(-1)).squeeze(-1)
        score_M = rows.reduce(torch.where(here_M, score_M, 0.0), dist.ReduceOp.SUM)
        exp_MV = scores_MV.exp_()
        total_M = rows.reduce(exp_MV.sum(dim=-1), dist.ReduceOp.SUM)
        ctx.save_for_backward(exp_MV.div_(total_M.unsqueeze(-1)), targets_M)
        ctx.rows, ctx.dtype = rows, logits_MV.dtype
        return total_M.log() - score_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Softmax minus one-hot, times the incoming gradient.

        Args:
            ctx: Autograd context.
            *grads: float32 [M].

        Returns:
            Gradient of the logits, float [M, V].
        """
        (grad_M,) = grads
        grad_MV, targets_M = ctx.saved_tensors
        grad_MV = grad_MV.clone()
        local_M = targets_M - ctx.rows.first_id
        here_M = (local_M >= 0) & (local_M < ctx.rows.num_rows)
        index_M = torch.nonzero(here_M).squeeze(-1)
        grad_MV[index_M, local_M[index_M]] -= 1.0
        return (grad_MV * grad_M.unsqueeze(-1)).to(ctx.dtype), None, None
