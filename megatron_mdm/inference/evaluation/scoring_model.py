"""What scoring asks of a model: log-probabilities of some tokens of a batch, in float32.

Shapes: B batch, S sequence, C sequences of the other pass of guidance, Q asked positions of the row
that has the most, T asked positions of all, N targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.inference.generation.exported import ExportedModel
from megatron_mdm.inference.generation.text_model import ModelFacts

# Tokens of a forward pass: what stays in a core's cache, or fills a GPU.
TOKENS_OF_A_PASS = {"cpu": 1024, "cuda": 32768}


class Branches(NamedTuple):
    """Several texts in one row of a causal model: they have their beginning in common.

    Attributes:
        branch_BS: int64 [B, S], the text that a token belongs to, from 1 on; 0: all of them. What
            is common comes first.
        positions_BS: int64 [B, S], the token's place in its text.
    """

    branch_BS: Tensor
    positions_BS: Tensor


@dataclass(frozen=True)
class ScoringBatch:
    """Sequences that share a forward pass. Tensors lie on the CPU.

    Attributes:
        tokens_BS: int64 [B, S], with mask tokens where something is hidden; padded on the right.
        is_real_BS: Bool [B, S], False at padding.
        asked_BS: Bool [B, S], T of them True: positions that the model is asked about.
        targets_N: int64 [N], tokens whose log-probabilities are wanted.
        places_N: int64 [N], the asked position of each, counted over T sequence by sequence, from
            left to right; None: there is one for each, in order.
        hidden_CS: int64 [C, S], what the other pass of guidance sees; None: there is none.
        hidden_index_B: int64 [B], the row of `hidden_CS` that belongs to each; rows that share one
            are as long and ask about the same positions. None: in order.
        guidance_scale: w of `u + (w + 1)(c - u)`.
        branches: What each token belongs to; None: every row is one text.
    """

    tokens_BS: Tensor
    is_real_BS: Tensor
    asked_BS: Tensor
    targets_N: Tensor
    places_N: Tensor | None = None
    hidden_CS: Tensor | None = None
    hidden_index_B: Tensor | None = None
    guidance_scale: float = 0.0
    branches: Branches | None = None


class Judgement(NamedTuple):
    """What a model says of the targets.

    Attributes:
        log_probs_N: float32 [N], nats, on the CPU.
        confidences_N: float32 [N], log-probability of the likeliest token there.
        is_best_N: Bool [N], is the target that token?
    """

    log_probs_N: Tensor
    confidences_N: Tensor
    is_best_N: Tensor


class ScoringModel(Protocol):
    """A model that can be asked."""

    facts: ModelFacts
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

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
        if self.facts.is_causal and not hasattr(self._model.model, "takes_key_masks"):
            raise ConfigError(
                f"--model={folder} was exported by an earlier version, whose code travels in the "
                "folder: export the checkpoint again."
            )

    @property
    def device(self) -> torch.device:
        """See `ScoringModel.device`."""
        device: torch.device = self._model.device
        return device

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
    picked_BQ, is_asked_BQ = _asked_columns(batch.asked_BS)
    hidden_BQH = _hidden_at(model, batch.tokens_BS, batch.is_real_BS, picked_BQ, batch.branches)
    if batch.hidden_CS is not None and batch.guidance_scale != 0:
        index_B = batch.hidden_index_B
        if index_B is None:
            index_B = torch.arange(len(batch.tokens_BS))
        # Rows with the same other pass are alike in these.
        picked_CQ = torch.empty(len(batch.hidden_CS), picked_BQ.shape[1], dtype=torch.int64)
        picked_CQ[index_B] = picked_BQ
        is_real_CS = torch.empty_like(batch.hidden_CS, dtype=torch.bool)
        is_real_CS[index_B] = batch.is_real_BS
        others_CQH = _hidden_at(model, batch.hidden_CS, is_real_CS, picked_CQ)
        # The output layer is linear: what holds of hidden states holds of logits.
        wide = torch.promote_types(hidden_BQH.dtype, torch.float32)
        others_BQH = others_CQH[index_B.to(others_CQH.device)].to(wide)
        guided_BQH = others_BQH + (batch.guidance_scale + 1) * (hidden_BQH.to(wide) - others_BQH)
        hidden_BQH = guided_BQH.to(hidden_BQH.dtype)
    # The output layer is most of a small model: only where it is asked for.
    logits_TV = model.output_logits(hidden_BQH[is_asked_BQ.to(hidden_BQH.device)])
    return judge_logits(logits_TV.float(), batch.targets_N, batch.places_N)


def _hidden_at(
    model: Any,
    tokens_BS: Tensor,
    is_real_BS: Tensor,
    picked_BQ: Tensor,
    branches: Branches | None = None,
) -> Tensor:
    """Normed hidden states of the picked columns, [B, Q, H]."""
    device = model.device
    mask: Tensor | None = None
    positions_BS: Tensor | None = None
    if branches is not None:
        mask = _visible(branches.branch_BS.to(device))
        positions_BS = branches.positions_BS.to(device)
    elif not model.config.is_causal and not bool(is_real_BS.all()):
        # Without a mask the model can use the faster kernels; a causal one sees no padding anyway.
        mask = is_real_BS.long().to(device)
    asked = None if picked_BQ.shape[1] == tokens_BS.shape[1] else picked_BQ.to(device)
    hidden_BQH: Tensor = model.model(tokens_BS.to(device), mask, positions_BS, None, asked)
    return hidden_BQH


def _asked_columns(asked_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Asked columns of each row in order, int64 [B, Q], filled up with others, and which are."""
    most = int(asked_BS.sum(1).max())
    if most == asked_BS.shape[1]:
        return torch.arange(most).expand(asked_BS.shape), asked_BS
    picked_BQ = (~asked_BS).int().argsort(dim=1, stable=True)[:, :most]
    return picked_BQ, asked_BS.gather(1, picked_BQ)


def _visible(branch_BS: Tensor) -> Tensor:
    """Bool [B, S, S]: a token sees those before it, of its own text and of what is common."""
    keys_B1S, queries_BS1 = branch_BS[:, None], branch_BS[:, :, None]
    columns_S = torch.arange(branch_BS.shape[1], device=branch_BS.device)
    return (columns_S <= columns_S[:, None]) & ((keys_B1S == 0) | (keys_B1S == queries_BS1))


def judge_logits(logits_TV: Tensor, targets_N: Tensor, places_N: Tensor | None = None) -> Judgement:
    """Judges targets by logits.

    Args:
        logits_TV: float32 [T, V].
        targets_N: int64 [N].
        places_N: Row of each target, int64 [N]; None: T is N.

    Returns:
        The judgement, on the CPU.
    """
    targets_N = targets_N.to(logits_TV.device)
    if places_N is None:
        places_N = torch.arange(len(logits_TV))
    places_N = places_N.to(logits_TV.device)
    sums_T = logits_TV.logsumexp(1)
    best_T, index_T = logits_TV.max(1)
    return Judgement(
        (logits_TV[places_N, targets_N] - sums_T[places_N]).cpu(),
        (best_T - sums_T)[places_N].cpu(),
        (index_T[places_N] == targets_N).cpu(),
    )
