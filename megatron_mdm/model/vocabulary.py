"""The split vocabulary: which tokens a tensor-parallel rank's rows of the head stand for.

Shapes: H hidden, M positions that count, C of them in a chunk, V this rank's columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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
