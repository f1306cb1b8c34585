"""Loss heads: what the training loss is at each position that counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from megatron_mdm.config import Config
from megatron_mdm.config.component import build_component
from megatron_mdm.config.objective import LOSS_HEADS, LossHeadConfig, RunFacts
from megatron_mdm.config.section import NonNegativeFloat
from megatron_mdm.diffusion.objectives import collect_facts

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mdm.model.head import Predictions
    from megatron_mdm.model.vocabulary import VocabularySlice


class LossHead(ABC):
    """From hidden states to losses, over the part of the vocabulary that this rank holds.

    The one of the section `objective.loss_head` is used in training alone: the held-out loss is
    always the bound of the objective.
    """

    @abstractmethod
    def __call__(
        self, hidden_MH: Tensor, weight_VH: Tensor, predictions: Predictions, rows: VocabularySlice
    ) -> Tensor:
        """Computes the losses of a micro batch.

        Args:
            hidden_MH: float [M, H], of the M positions that count, equal on all tensor-parallel
                ranks; its gradient is summed over them.
            weight_VH: float [V, H], this rank's rows of the output matrix.
            predictions: Targets, weights and sequences of the positions.
            rows: Which tokens the rows of `weight_VH` are. `logits`, `log_sum` and `scores`
                compute over all ranks what losses need, `sum` adds up anything else over them; all
                with gradients.

        Returns:
            For each sequence the sum of its weighted losses, float32 [B], nats.
        """


class CrossEntropyConfig(LossHeadConfig):
    """The cross-entropy, and a penalty on the size of the softmax's denominator.

    Source:
        Chowdhery et al. 2022, "PaLM", section 5 (z-loss).
    """

    kind: str = Field(default="cross_entropy", description="The loss head.")
    z_loss: NonNegativeFloat = Field(
        default=0.0,
        description="Weight of a penalty at each position that counts: times the square of the log "
        "of the softmax's denominator, and times the position's own weight, as the cross-entropy "
        "is. 1e-4 is common. It is trained and not reported: losses stay cross-entropies.",
    )

    is_bound: ClassVar[bool] = True

    def build(self, run: RunFacts) -> LossHead:
        """Makes the loss head, whose logits never exist all at once."""
        del run
        # Imported here: a configuration is also read where torch is not needed.
        from megatron_mdm.model.head import CrossEntropy

        return CrossEntropy(self.z_loss)


def build_loss_head(config: Config) -> LossHead:
    """Builds the loss head of a run.

    Raises:
        ConfigError: The section of one from elsewhere builds something else.
    """
    section = config.objective.loss_head
    return build_component(section, "objective.loss_head", LossHead, collect_facts(config))


def build_held_out_head(config: Config) -> LossHead:
    """Builds the loss head of a run's held-out losses, which the objective names."""
    kind = config.objective.held_out_head
    section = LOSS_HEADS.find(kind, "objective.loss_head.kind")(kind=kind)
    return build_component(section, "objective.loss_head", LossHead, collect_facts(config))
