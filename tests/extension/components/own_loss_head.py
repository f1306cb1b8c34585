"""A loss head from outside the package: cross-entropy and a penalty on the softmax's size."""

import torch
from pydantic import Field

from megatron_mdm.config.objective import LossHeadConfig, RunFacts
from megatron_mdm.model.loss_heads import LossHead


class ZLossConfig(LossHeadConfig):
    """Cross-entropy plus `scale` times the square of the log of the softmax's denominator."""

    scale: float = Field(default=1e-4, ge=0, description="Weight of the penalty.")

    def build(self, run: RunFacts) -> LossHead:
        return ZLoss(self.scale)


class ZLoss(LossHead):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, hidden_MH, weight_VH, predictions, rows):
        logits_MV = rows.logits(hidden_MH, weight_VH)
        log_sum_M = rows.log_sum(logits_MV)
        nll_M = log_sum_M - rows.scores(logits_MV, predictions.targets_M)
        losses_M = (nll_M + self.scale * log_sum_M.square()) * predictions.weights_M
        losses_B = torch.zeros(predictions.num_sequences, device=losses_M.device)
        return losses_B.index_add(0, predictions.sequence_M, losses_M)


class PerPositionConfig(LossHeadConfig):
    """A mistake: a loss for each position."""

    def build(self, run: RunFacts) -> LossHead:
        return PerPosition()


class PerPosition(LossHead):
    def __call__(self, hidden_MH, weight_VH, predictions, rows):
        logits_MV = rows.logits(hidden_MH, weight_VH)
        return rows.log_sum(logits_MV) - rows.scores(logits_MV, predictions.targets_M)


class NothingConfig(LossHeadConfig):
    """A mistake: builds nothing."""

    def build(self, run: RunFacts) -> None:
        return None


class WithoutFactsConfig(LossHeadConfig):
    """A mistake: takes no facts of the run."""

    def build(self) -> LossHead:
        return PerPosition()
