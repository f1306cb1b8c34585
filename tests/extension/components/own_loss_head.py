"""A loss head from outside the package: cross-entropy with smoothed labels."""

import torch
from pydantic import Field

from megatron_mdm.config.objective import LossHeadConfig, RunFacts
from megatron_mdm.model.loss_heads import LossHead


class SmoothedConfig(LossHeadConfig):
    """Cross-entropy with a share of each target spread evenly over the vocabulary."""

    share: float = Field(default=0.1, ge=0, lt=1, description="Share that is spread.")

    def build(self, run: RunFacts) -> LossHead:
        return SmoothedLabels(self.share)


class SmoothedLabels(LossHead):
    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, hidden_MH, weight_VH, predictions, rows):
        logits_MV = rows.logits(hidden_MH, weight_VH)
        targets_M = rows.scores(logits_MV, predictions.targets_M)
        possible_MV = torch.where(torch.isfinite(logits_MV), logits_MV, 0.0)
        mean_M = rows.sum(possible_MV.sum(dim=-1)) / rows.num_possible
        score_M = (1 - self.share) * targets_M + self.share * mean_M
        losses_M = (rows.log_sum(logits_MV) - score_M) * predictions.weights_M
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
