"""What scoring asks of a model: log-probabilities of some tokens of a batch, in float32.

Shapes: B batch, S sequence, T tokens that are asked for, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mdm.generation.exported import ExportedModel
from megatron_mdm.generation.text_model import ModelFacts


@dataclass(frozen=True)
class ScoringBatch:
    """Sequences that share a forward pass. Tensors lie on the CPU.

    Attributes:
        tokens_BS: int64 [B, S], with mask tokens where something is hidden; padded on the right.
        is_real_BS: Bool [B, S], False at padding.
        asked_BS: Bool [B, S], T of them True: positions whose logits are wanted.
        targets_T: int64 [T], a token for each, sequence by sequence, from left to right.
        hidden_BS: int64 [B, S], what the other pass of guidance sees; None without guidance.
        guidance_scale: w of `u + (w + 1)(c - u)`.
    """

    tokens_BS: Tensor
    is_real_BS: Tensor
    asked_BS: Tensor
    targets_T: Tensor
    hidden_BS: Tensor | None = None
    guidance_scale: float = 0.0


class Judgement(NamedTuple):
    """What a model says of the asked tokens.

    Attributes:
        log_probs_T: float32 [T], nats, on the CPU.
        confidences_T: float32 [T], log-probability of the likeliest token there.
        is_best_T: Bool [T], is the target that token?
    """

    log_probs_T: Tensor
    confidences_T: Tensor
    is_best_T: Tensor


class ScoringModel(Protocol):
    """A model that can be asked."""

    facts: ModelFacts
    tokenizer: Any

    def judge(self, batch: ScoringBatch) -> Judgement:
        """Log-probabilities of the targets at the asked positions."""
        ...


class ExportedScoringModel(ExportedModel):
    """An exported model that is asked, its softmax in float32 whatever its dtype.

    Args:
        folder: Folder of an exported model.
        dtype: Of the weights and of the passes; None: as exported.

    Raises:
        ConfigError: The folder holds no model that can be loaded.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__(folder, dtype)

    def judge(self, batch: ScoringBatch) -> Judgement:
        """See `ScoringModel.judge`."""
        return judge_with(self._model, batch)


@torch.inference_mode()
def judge_with(model: Any, batch: ScoringBatch) -> Judgement:
    """Asks the model of an export.

    Args:
        model: As transformers loads it.
        batch: What is asked.

    Returns:
        The judgement.
    """
    logits_TV = _logits(model, batch.tokens_BS, batch)
    if batch.hidden_BS is not None and batch.guidance_scale != 0:
        others_TV = _logits(model, batch.hidden_BS, batch)
        logits_TV = others_TV + (batch.guidance_scale + 1) * (logits_TV - others_TV)
        # Of the mask token, -inf less -inf.
        logits_TV = torch.where(logits_TV.isnan(), -torch.inf, logits_TV)
    return judge_logits(logits_TV, batch.targets_T)


def _logits(model: Any, tokens_BS: Tensor, batch: ScoringBatch) -> Tensor:
    # Without padding the model can use the faster kernels.
    mask_BS = None if bool(batch.is_real_BS.all()) else batch.is_real_BS.long().to(model.device)
    hidden_BSH = model.model(tokens_BS.to(model.device), mask_BS, None)
    # The output layer is most of a small model: only where it is asked for.
    logits_TV: Tensor = model.output_logits(hidden_BSH[batch.asked_BS.to(model.device)])
    return logits_TV.float()


def judge_logits(logits_TV: Tensor, targets_T: Tensor) -> Judgement:
    """Judges targets by logits.

    Args:
        logits_TV: float32 [T, V].
        targets_T: int64 [T].

    Returns:
        The judgement, on the CPU.
    """
    targets_T1 = targets_T.to(logits_TV.device)[:, None]
    sums_T = logits_TV.logsumexp(1)
    best_T, index_T = logits_TV.max(1)
    return Judgement(
        (logits_TV.gather(1, targets_T1)[:, 0] - sums_T).cpu(),
        (best_T - sums_T).cpu(),
        (index_T == targets_T1[:, 0]).cpu(),
    )
