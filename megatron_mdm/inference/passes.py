"""Forward passes for scoring: rows of tokens, the targets in them, and the model's judgement.

Shapes: R rows, S columns, C rows of the other pass of guidance, Q asked columns of the row that has
the most, T asked positions of all, N targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.diffusion.interpolating import CLEAN, UNIFORM
from megatron_mdm.model.head import Predictions
from megatron_mdm.model.interpolating_head import bound_of_chunk
from megatron_mdm.model.vocabulary import VocabularySlice

IntArray = NDArray[np.int64]


class Judgement(NamedTuple):
    """A model's judgement of tokens; arrays of one shape.

    Attributes:
        log_probs: float32, nats.
        confidences: float32, log-probability of the likeliest token there.
        is_best: Bool, is the token that one?
    """

    log_probs: NDArray[np.float32]
    confidences: NDArray[np.float32]
    is_best: NDArray[np.bool_]

    @classmethod
    def make_blank(cls, *shape: int) -> Judgement:
        """Makes a judgement of no token yet: 0, and True."""
        zeros = np.zeros((2, *shape), dtype=np.float32)
        return cls(zeros[0], zeros[1], np.ones(shape, dtype=bool))

    def take(self, start: int, stop: int) -> Judgement:
        """Takes the judgement of some of the tokens."""
        return Judgement(*(values[start:stop] for values in self))  # type: ignore[arg-type]


class Guidance(NamedTuple):
    """The other pass of classifier-free guidance, u in `u + (w + 1)(c - u)`.

    Attributes:
        tokens_CS: int64 [C, S], what it sees: distinct rows.
        index_R: int64 [R], which of them belongs to each row; rows that share one are as long and
            ask about the same columns.
        scale: w.
    """

    tokens_CS: IntArray
    index_R: IntArray
    scale: float

    def spread(self, values_R: Tensor) -> Tensor:
        """Values [C, ...] of the distinct rows, from those [R, ...] of rows that share one."""
        values_C = values_R.new_empty(len(self.tokens_CS), *values_R.shape[1:])
        # Rows that share a guidance pass agree in these.
        values_C[torch.from_numpy(self.index_R)] = values_R
        return values_C


class Branches(NamedTuple):
    """Several texts in one row of a causal model, with their beginning in common.

    Attributes:
        branch_RS: int64 [R, S], the text that a token belongs to, from 1 on; 0: all of them. What
            is common comes first.
        positions_RS: int64 [R, S], the token's place in its text.
    """

    branch_RS: IntArray
    positions_RS: IntArray


class NoiseTargets(NamedTuple):
    """What hybrid or uniform noise does at the targets.

    Attributes:
        chances_N2: float64 [N, 2], that a token is left alone, and that it becomes any one other.
        mask_token_id: Id of the mask token.
    """

    chances_N2: NDArray[np.float64]
    mask_token_id: int

    def take(self, chosen_N: IntArray) -> NoiseTargets:
        """That of some of the targets."""
        return self._replace(chances_N2=self.chances_N2[chosen_N])


@dataclass(frozen=True)
class Passes:
    """Rows to run.

    Attributes:
        tokens_RS: int64 [R, S], with mask tokens where something is hidden; 0 after a row's end.
        lengths_R: int64 [R], tokens of each row.
        asked_RS: Bool [R, S], columns whose logits are needed, at least one in a row.
        rows_N: int64 [N], row of each target.
        columns_N: int64 [N], where it is asked for.
        targets_N: int64 [N], the token.
        guidance: The other pass; None: there is none.
        branches: What each token belongs to; None: every row is one text.
        noise: Hybrid or uniform noise, whose bound takes the place of log-probabilities in the
            judgement; None: masks alone.
        prefix_R: int64 [R], of a causal model: tokens at the start of each row that see each other;
            None: none do.
        log_snr_R: float32 [R], of the noise of each row; None: the model takes none.
    """

    tokens_RS: IntArray
    lengths_R: IntArray
    asked_RS: NDArray[np.bool_]
    rows_N: IntArray
    columns_N: IntArray
    targets_N: IntArray
    guidance: Guidance | None = None
    branches: Branches | None = None
    noise: NoiseTargets | None = None
    prefix_R: IntArray | None = None
    log_snr_R: NDArray[np.float32] | None = None

    @property
    def is_real_RS(self) -> NDArray[np.bool_]:
        """Bool [R, S], False at padding."""
        return np.arange(self.tokens_RS.shape[1]) < self.lengths_R[:, None]

    def take(self, chosen_R: IntArray, chosen_N: IntArray) -> Passes:
        """Takes some of the rows.

        Args:
            chosen_R: Which, in their new order.
            chosen_N: Targets that are asked of them.

        Returns:
            These alone, no wider than the longest.
        """
        longest = int(self.lengths_R[chosen_R].max())
        place_R = np.empty(len(self.lengths_R), dtype=np.int64)
        place_R[chosen_R] = np.arange(len(chosen_R))
        guidance, branches = self.guidance, self.branches
        if guidance is not None:
            used_C, index_R = np.unique(guidance.index_R[chosen_R], return_inverse=True)
            guidance = Guidance(guidance.tokens_CS[used_C, :longest], index_R, guidance.scale)
        if branches is not None:
            branches = Branches(*(part_RS[chosen_R, :longest] for part_RS in branches))
            # Rows of one text each need no mask.
            branches = branches if (branches.branch_RS > 1).any() else None
        return replace(
            self,
            tokens_RS=self.tokens_RS[chosen_R, :longest],
            lengths_R=self.lengths_R[chosen_R],
            asked_RS=self.asked_RS[chosen_R, :longest],
            rows_N=place_R[self.rows_N[chosen_N]],
            columns_N=self.columns_N[chosen_N],
            targets_N=self.targets_N[chosen_N],
            guidance=guidance,
            branches=branches,
            noise=None if self.noise is None else self.noise.take(chosen_N),
            prefix_R=None if self.prefix_R is None else self.prefix_R[chosen_R],
            log_snr_R=None if self.log_snr_R is None else self.log_snr_R[chosen_R],
        )


def takes_log_snr(model: Any) -> bool:
    """Has the model of an export an embedding of the noise level? Those of old ones have none."""
    return bool(getattr(model.config, "time_embedding", False))


def judge_with(model: Any, passes: Passes) -> Judgement:
    """Runs passes with the model of an export and judges their targets."""
    return judge_logits(compute_logits(model, passes), passes)


@torch.inference_mode()
def compute_logits(model: Any, passes: Passes) -> Tensor:
    """Runs passes with the model of an export, all at once.

    Args:
        model: As transformers loads it.
        passes: What is asked.

    Returns:
        float32 [T, V], row by row of the passes; -inf where a token cannot be.
    """
    asked_RS, is_real_RS = torch.from_numpy(passes.asked_RS), torch.from_numpy(passes.is_real_RS)
    tokens_RS = torch.from_numpy(passes.tokens_RS)
    picked_RQ, is_asked_RQ = _find_asked_columns(asked_RS)
    mask_RSS, positions_RS = _lay_out_texts(passes, model.device)
    log_snr_R = None
    if takes_log_snr(model) and passes.log_snr_R is not None:
        log_snr_R = torch.from_numpy(passes.log_snr_R)
    hidden_RQH = _compute_hidden(
        model, tokens_RS, is_real_RS, picked_RQ, mask_RSS, positions_RS, log_snr_R
    )
    if passes.guidance is not None:
        index_R, scale = torch.from_numpy(passes.guidance.index_R), passes.guidance.scale
        others_CS, spread = torch.from_numpy(passes.guidance.tokens_CS), passes.guidance.spread
        others_CQH = _compute_hidden(
            model,
            others_CS,
            spread(is_real_RS),
            spread(picked_RQ),
            log_snr_R=None if log_snr_R is None else spread(log_snr_R),
        )
        # The output layer is linear, so hidden states can be combined in place of logits.
        wide = torch.promote_types(hidden_RQH.dtype, torch.float32)
        others_RQH = others_CQH[index_R.to(others_CQH.device)].to(wide)
        guided_RQH = others_RQH + (scale + 1) * (hidden_RQH.to(wide) - others_RQH)
        hidden_RQH = guided_RQH.to(hidden_RQH.dtype)
    # Only at the asked positions: the output layer is most of a small model.
    logits_TV: Tensor = model.output_logits(hidden_RQH[is_asked_RQ.to(hidden_RQH.device)])
    return logits_TV.float()


@torch.inference_mode()
def judge_logits(logits_TV: Tensor, passes: Passes) -> Judgement:
    """Judges the targets of passes, with the softmax in float32.

    Args:
        logits_TV: float32 [T, V], of the asked positions; up to a constant for each.
        passes: What is asked.

    Returns:
        The judgement of the N targets.
    """
    # Which of the asked positions each target is at.
    number_RS = passes.asked_RS.cumsum().reshape(passes.asked_RS.shape) - 1
    places_N = torch.from_numpy(number_RS[passes.rows_N, passes.columns_N]).to(logits_TV.device)
    targets_N = torch.from_numpy(passes.targets_N).to(logits_TV.device)
    sums_T = logits_TV.logsumexp(1)
    best_T, index_T = logits_TV.max(1)
    if passes.noise is None:
        values_N = logits_TV[places_N, targets_N] - sums_T[places_N]
    else:
        values_N = -_find_bound(logits_TV[places_N], passes, passes.noise)
    return Judgement(
        values_N.cpu().numpy(),
        (best_T - sums_T)[places_N].cpu().numpy(),
        (index_T[places_N] == targets_N).cpu().numpy(),
    )


def _find_bound(logits_NV: Tensor, passes: Passes, noise: NoiseTargets) -> Tensor:
    """What the bound of the noise takes at each target, without weights, float32 [N]."""
    device, vocab_size = logits_NV.device, logits_NV.shape[1]
    shown_N = torch.from_numpy(passes.tokens_RS[passes.rows_N, passes.columns_N]).to(device)
    targets_N = torch.from_numpy(passes.targets_N).to(device)
    chances_N2 = torch.from_numpy(noise.chances_N2).to(device)
    predictions = Predictions(
        targets_N,
        torch.ones_like(targets_N, dtype=logits_NV.dtype),
        torch.zeros_like(targets_N),
        1,
        shown_N,
        dict(zip((CLEAN, UNIFORM), chances_N2.unbind(1), strict=True)),
    )
    rows = VocabularySlice(0, vocab_size, vocab_size, noise.mask_token_id, None)
    return bound_of_chunk(logits_NV, predictions, rows, needs_gradient=False)


def _compute_hidden(
    model: Any,
    tokens_RS: Tensor,
    is_real_RS: Tensor,
    picked_RQ: Tensor,
    mask: Tensor | None = None,
    positions_RS: Tensor | None = None,
    log_snr_R: Tensor | None = None,
) -> Tensor:
    """Computes the normed hidden states of the picked columns, [R, Q, H]."""
    device = model.device
    if mask is None and not model.config.is_causal and not bool(is_real_RS.all()):
        # Without a mask the model can use the faster kernels; a causal one sees no padding anyway.
        mask = is_real_RS.long()
    asked = None if picked_RQ.shape[1] == tokens_RS.shape[1] else picked_RQ
    inputs = (tokens_RS, mask, positions_RS, None, asked)
    # Exports of earlier versions know no log-SNR.
    told = {} if log_snr_R is None else {"log_snr": log_snr_R.to(device)}
    hidden_RQH: Tensor = model.model(*(x if x is None else x.to(device) for x in inputs), **told)
    return hidden_RQH


def _lay_out_texts(passes: Passes, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Lays out the texts of each row of a causal model: who sees whom, and positions.

    Returns:
        Bool [R, S, S], None where each token sees those before it; and int64 [R, S], None where
        tokens stand in their columns.
    """
    branches, prefix_R = passes.branches, passes.prefix_R
    if branches is None and prefix_R is None:
        return None, None
    branch_RS = np.zeros_like(passes.tokens_RS) if branches is None else branches.branch_RS
    mask_RSS = _build_visibility_mask(torch.from_numpy(branch_RS).to(device))
    if prefix_R is not None:
        columns_S = torch.arange(branch_RS.shape[1], device=device)
        is_prefix_RS = columns_S < torch.from_numpy(prefix_R).to(device)[:, None]
        mask_RSS |= is_prefix_RS[:, None] & is_prefix_RS[:, :, None]
    return mask_RSS, None if branches is None else torch.from_numpy(branches.positions_RS)


def _find_asked_columns(asked_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Finds each row's asked columns, int64 [R, Q], padded with others, and which are asked."""
    most = int(asked_RS.sum(1).max())
    if most == asked_RS.shape[1]:
        return torch.arange(most).expand(asked_RS.shape), asked_RS
    picked_RQ = (~asked_RS).int().argsort(dim=1, stable=True)[:, :most]
    return picked_RQ, asked_RS.gather(1, picked_RQ)


def _build_visibility_mask(branch_RS: Tensor) -> Tensor:
    """Builds bool [R, S, S]: a token sees those before it, of its own text and of the context."""
    keys_R1S, queries_RS1 = branch_RS[:, None], branch_RS[:, :, None]
    columns_S = torch.arange(branch_RS.shape[1], device=branch_RS.device)
    return (columns_S <= columns_S[:, None]) & ((keys_R1S == 0) | (keys_R1S == queries_RS1))
