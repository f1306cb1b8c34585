"""The bound of interpolating noise over the split vocabulary, a chunk of positions at a time.

A position that shows the token z, of a text whose token there is x0, costs
`KL(q(. | x0) || q_hat) + R - 1 - ln R` with `q_hat = a x_hat + b` and `R = q(z | x0) / q_hat(z)`;
x_hat is the softmax. With rho = a / b and `s(v) = ln(1 + rho x_hat(v))` all of it follows from sums
over the vocabulary, and no q is ever made:

    D = ln(1 + rho) - s(x0),  KL = (a + b) D - b sum of s(v) over v other than x0,
    ln R = D where z is x0, -s(z) where it is another token, 0 where it is the mask token.

Source:
    arXiv 2503.04482, proposition 2, for any weights.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from megatron_mdm.config.objective import LossHeadConfig, RunFacts
from megatron_mdm.config.section import NonNegativeFloat
from megatron_mdm.diffusion.interpolating import CLEAN, UNIFORM
from megatron_mdm.model.head import Predictions, compute_in_chunks
from megatron_mdm.model.loss_heads import LossHead
from megatron_mdm.model.vocabulary import LocalTargets, VocabularySlice

# Without uniform noise rho is infinite: so much changes nothing in float32, and stays finite.
_GREATEST_LOG_RATIO = 80.0


class InterpolatingHeadConfig(LossHeadConfig):
    """The bound of hybrid and uniform noise."""

    kind: str = Field(default="interpolating", description="The loss head.")

    z_loss: NonNegativeFloat = Field(
        default=0.0, description="As that of the cross-entropy; trained and not reported."
    )

    is_bound: ClassVar[bool] = True
    # Besides those of a softmax the logit of the token shown, and two sums over the vocabulary.
    num_reductions: ClassVar[int] = 3
    num_reduced: ClassVar[int] = 6

    def build(self, run: RunFacts) -> LossHead:
        """Makes the loss head."""
        del run
        return InterpolatingBound(self.z_loss)


class InterpolatingBound(LossHead):
    """The bound at each position, whose weight is that of its time and of what it shows.

    Args:
        z_loss: As for `cross_entropy_of_chunk`.
    """

    def __init__(self, z_loss: float = 0.0) -> None:
        self._z_loss = z_loss

    def __call__(
        self, hidden_MH: Tensor, weight_VH: Tensor, predictions: Predictions, rows: VocabularySlice
    ) -> Tensor:
        """As `ChunkedLinearLoss`, whose gradients are those of the sum or mean of the losses."""
        chunk_loss = partial(bound_of_chunk, z_loss=self._z_loss)
        return compute_in_chunks(hidden_MH, weight_VH, predictions, rows, chunk_loss)


class _Chances(NamedTuple):
    """What the noise does at each position, [C]: a, b, rho, ln(rho)."""

    clean_C: Tensor
    uniform_C: Tensor
    ratio_C: Tensor
    log_ratio_C: Tensor

    @classmethod
    def read(cls, predictions: Predictions, dtype: torch.dtype) -> _Chances:
        clean_C, uniform_C = (predictions.more[name].to(dtype) for name in (CLEAN, UNIFORM))
        log_C = (clean_C.log() - uniform_C.log()).nan_to_num(nan=0.0, posinf=torch.inf)
        log_C = log_C.clamp(-_GREATEST_LOG_RATIO, _GREATEST_LOG_RATIO)
        return cls(clean_C, uniform_C, log_C.exp(), log_C)


def bound_of_chunk(
    logits_CV: Tensor,
    predictions: Predictions,
    rows: VocabularySlice,
    *,
    needs_gradient: bool,
    z_loss: float = 0.0,
) -> Tensor:
    """The bound without its weights, as `ChunkLoss` says; three small all-reduces.

    Raises:
        KeyError: The objective does not tell the chances of its noise.
    """
    assert predictions.inputs_M is not None
    at = _Chances.read(predictions, logits_CV.dtype)
    clean, shown = (
        LocalTargets.locate(tokens_C, rows)
        for tokens_C in (predictions.targets_M, predictions.inputs_M)
    )
    is_right_C = predictions.inputs_M == predictions.targets_M
    is_mask_C = predictions.inputs_M == rows.mask_token_id
    log_clean_C, log_shown_C, log_sum_C = _scale_softmax_in_place(
        logits_CV, at.ratio_C, clean, shown, rows
    )
    y_CV, slopes_CV = logits_CV, None
    # That of x0 is left out of the sum, of which nearly all is lost to rounding otherwise.
    clean.set(y_CV, 0.0)
    sum_C, slope_sum_C = y_CV.log1p().sum(dim=-1), torch.zeros_like(log_sum_C)
    if needs_gradient:
        # How s changes with ln x_hat.
        slopes_CV = y_CV + 1.0
        slope_sum_C = torch.div(y_CV, slopes_CV, out=slopes_CV).sum(dim=-1)
    sum_C, slope_sum_C = rows.reduce(torch.stack([sum_C, slope_sum_C]), dist.ReduceOp.SUM).unbind()

    distance_C = _log_gap(log_clean_C, at)
    divergence_C = (at.clean_C + at.uniform_C) * distance_C - at.uniform_C * sum_C
    soft_shown_C = torch.nn.functional.softplus(log_shown_C + at.log_ratio_C)
    log_R_C = torch.where(is_right_C, distance_C, -soft_shown_C).masked_fill(is_mask_C, 0.0)
    excess_C = log_R_C.expm1()
    loss_C = divergence_C + excess_C - log_R_C
    if slopes_CV is not None:
        # By ln x_hat(v): -b slope(v), at x0 also -a slope, at z also -(R - 1) slope.
        slope_C = (log_clean_C + at.log_ratio_C).sigmoid()
        at_clean_C = (at.clean_C + at.uniform_C) * slope_C
        at_shown_C = excess_C * (log_shown_C + at.log_ratio_C).sigmoid()
        at_shown_C = at_shown_C.masked_fill(is_mask_C, 0.0)
        # By the logits: less x_hat times the sum of all of them.
        total_C = at.uniform_C * slope_sum_C + at_clean_C + at_shown_C
        total_C = total_C + 2.0 * z_loss * log_sum_C
        y_CV.mul_((total_C / at.ratio_C)[:, None])
        y_CV.addcmul_(slopes_CV, at.uniform_C[:, None].expand_as(slopes_CV), value=-1.0)
        clean.add(y_CV, total_C * log_clean_C.exp() - at_clean_C)
        shown.add(y_CV, -at_shown_C)
    return loss_C


def _log_gap(log_clean_C: Tensor, at: _Chances) -> Tensor:
    """ln(1 + rho) - ln(1 + rho x_hat(x0)), [C], without the difference of two large numbers."""
    gap_C = torch.nn.functional.softplus(at.log_ratio_C)
    gap_C = gap_C - torch.nn.functional.softplus(log_clean_C + at.log_ratio_C)
    # Where x_hat is near 1 both are alike.
    near_C = -torch.log1p(log_clean_C.expm1() * at.log_ratio_C.sigmoid())
    return torch.where(log_clean_C > -0.5, near_C, gap_C)


def _scale_softmax_in_place(
    logits_CV: Tensor,
    ratio_C: Tensor,
    clean: LocalTargets,
    shown: LocalTargets,
    rows: VocabularySlice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns logits into rho x_hat over all ranks' columns.

    Args:
        logits_CV: float32 [C, V], overwritten.
        ratio_C: rho of each position.
        clean: Where the clean tokens are.
        shown: Where the tokens are that the model sees; the mask token is nowhere.
        rows: What the columns stand for.

    Returns:
        Log-probabilities of both, on whatever rank they are, and the log of the softmax's
        denominator, [C] each.
    """
    rows.exclude(logits_CV)
    highest_C = rows.reduce(logits_CV.amax(dim=-1), dist.ReduceOp.MAX)
    logits_CV.sub_(highest_C[:, None])
    clean_C, shown_C = clean.select(logits_CV), shown.select(logits_CV)
    parts = [clean_C, shown_C, logits_CV.exp_().sum(dim=-1)]
    clean_C, shown_C, total_C = rows.reduce(torch.stack(parts), dist.ReduceOp.SUM).unbind()
    logits_CV.mul_((ratio_C / total_C)[:, None])
    log_total_C = total_C.log()
    return clean_C - log_total_C, shown_C - log_total_C, log_total_C + highest_C
