"""The sampler state of a batch: which tokens are masked, which are unmasked next, and when.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .block_steps import count_unmasked_after, plan_block_steps
from .decoding import PLANNED_ORDERS, Decoding, derive_seeds
from .token_choice import (
    choose_tokens,
    entropy_of,
    guided_logits,
    margin_of,
    probability_of,
    restrict_logits,
)


class Window(NamedTuple):
    """Columns that may have changed since the pass before.

    Attributes:
        start: First column that the current block may change.
        stop: The column after the last one.
        step: Passes since the block began. At 0 anything may have changed, later only the window.
        log_snr_B: float32 [B], of the noise of each row of tokens; None: it is not told.
    """

    start: int
    stop: int
    step: int
    log_snr_B: Tensor | None = None


Denoiser = Callable[[Tensor], Tensor]
"""Maps tokens [B, S] (int64, with mask tokens) to logits [B, S, V]; padding is its own affair."""


@runtime_checkable
class WindowedDenoiser(Protocol):
    """A denoiser that computes only what a step needs, and may reuse what it has computed.

    It may also have `guided_logits_at(x_2BS, needed_2BS, window, guidance_scale)`, which combines
    the two passes of guidance before its output layer: that is linear, so the logits are the same
    but for rounding, at half the work in it.
    """

    def logits_at(self, x_BS: Tensor, needed_BS: Tensor, window: Window) -> Tensor:
        """Logits [T, V] of the T needed positions, sequence by sequence, from left to right."""
        ...


class LogitSource:
    """The logits of positions, of one pass or of the two of guidance.

    Args:
        x_BS: int64 [B, S], with mask tokens where tokens are generated.
        decoding: Guidance, and tokens that are never chosen.
        mask_token_id: Never chosen.
        vocab_size: Ids from it on are never chosen; None: all of V may be.
        guidance_tokens_BS: int64 [B, S], what the other pass sees where nothing is generated.
    """

    def __init__(
        self,
        x_BS: Tensor,
        decoding: Decoding,
        mask_token_id: int,
        vocab_size: int | None,
        guidance_tokens_BS: Tensor | None,
    ) -> None:
        self._scale = decoding.guidance_scale
        self._vocab_size = vocab_size
        self._forbidden = (mask_token_id, *decoding.forbidden_token_ids)
        self._generated_BS = x_BS == mask_token_id
        self._unconditional_BS = _check_guidance(guidance_tokens_BS, decoding, x_BS)

    def compute(
        self,
        denoiser: Denoiser | WindowedDenoiser,
        x_BS: Tensor,
        needed_BS: Tensor,
        window: Window,
    ) -> Tensor:
        """Computes logits.

        Args:
            denoiser: The model.
            x_BS: int64 [B, S], the tokens so far.
            needed_BS: Bool [B, S].
            window: Columns that may have changed.

        Returns:
            float [T, V] of the needed positions, -inf at what is never chosen.
        """
        if self._unconditional_BS is not None:
            other_BS = torch.where(self._generated_BS, x_BS, self._unconditional_BS)
            x_BS, needed_BS = torch.cat([x_BS, other_BS]), torch.cat([needed_BS, needed_BS])
            if window.log_snr_B is not None:
                window = window._replace(log_snr_B=window.log_snr_B.repeat(2))
            if hasattr(denoiser, "guided_logits_at"):
                logits_TV = denoiser.guided_logits_at(x_BS, needed_BS, window, self._scale)
                return restrict_logits(logits_TV, self._vocab_size, self._forbidden)
        if isinstance(denoiser, WindowedDenoiser):
            logits_TV = denoiser.logits_at(x_BS, needed_BS, window)
        else:
            logits_TV = denoiser(x_BS)[needed_BS]
        if self._unconditional_BS is not None:
            conditional_TV, unconditional_TV = restrict_logits(logits_TV, self._vocab_size).chunk(2)
            logits_TV = guided_logits(conditional_TV, unconditional_TV, self._scale)
        # Forbidden last: after guidance there are half as many logits.
        return restrict_logits(logits_TV, self._vocab_size, self._forbidden)


class SamplerState:
    """A batch that is being sampled; see `samplers.sample` for the arguments.

    Attributes:
        x_BS: int64 [B, S], the tokens so far.
        probability_BS: float32 [B, S], with which each was chosen; NaN where nothing was.
        num_blocks: Blocks of the sequence that has the most.
    """

    def __init__(
        self,
        x_BS: Tensor,
        decoding: Decoding,
        mask_token_id: int,
        vocab_size: int | None,
        guidance_tokens_BS: Tensor | None,
        seeds: Sequence[int] | None,
    ) -> None:
        check_tokens(x_BS)
        self._decoding = decoding
        self._mask_token_id = mask_token_id
        self._generators = make_generators(seeds, decoding, x_BS)
        self._logits = LogitSource(x_BS, decoding, mask_token_id, vocab_size, guidance_tokens_BS)
        self.x_BS = x_BS.clone()
        self.probability_BS = torch.full(x_BS.shape, torch.nan, device=x_BS.device)
        self._generated_BS = x_BS == mask_token_id
        # The block of each position that may still change, -1 elsewhere.
        rank_BS = self._generated_BS.cumsum(1) - 1
        length = decoding.block_length or x_BS.shape[1] or 1
        self._block_BS = torch.where(self._generated_BS, rank_BS // length, -1)
        masks = self._generated_BS.sum(1).tolist()
        self._steps = [plan_block_steps(count, decoding) for count in masks]
        self.num_blocks = max(map(len, self._steps), default=0)
        self._planned_BS = self._plan()

    def _plan(self) -> Tensor:
        """Scores of the positions in an order that is known beforehand; the highest comes first."""
        order = self._decoding.order
        if order == "left_to_right":
            columns_S = torch.arange(self.x_BS.shape[1], device=self.x_BS.device)
            return -columns_S.double().expand_as(self.x_BS)
        if order not in PLANNED_ORDERS:
            return torch.zeros(self.x_BS.shape, dtype=torch.float64, device=self.x_BS.device)
        drawn_BS = self._draw(self._generated_BS)
        if order == "random":
            return drawn_BS
        # A token masked at t is unmasked by s with probability 1 - s/t. Under the linear schedule
        # the interval in which it is unmasked is therefore uniform over the grid, and drawn at
        # once. The network does not see t, so an interval that unmasks nothing needs no pass.
        steps_BS = torch.ones_like(drawn_BS)
        for b, steps in enumerate(self._steps):
            for block, num_steps in enumerate(steps):
                steps_BS[b, self._block_BS[b] == block] = num_steps
        return -(drawn_BS * steps_BS).floor()

    def enter_block(self, block: int) -> Window:
        """Begins a block; returns the columns that it spans in the batch."""
        self._in_block_BS = self._block_BS == block
        self._block_steps = [steps[block] if block < len(steps) else 1 for steps in self._steps]
        self._step = 0
        self._find_masked()
        columns = self._in_block_BS.any(0).nonzero().flatten()
        if len(columns) == 0:
            # Every sequence has ended before this block.
            return Window(0, 0, 0)
        return Window(int(columns[0]), int(columns[-1]) + 1, 0)

    def is_unfinished(self) -> bool:
        """Does the block still have masks, or steps to revise what it has unmasked?"""
        if any(self._num_masked):
            return True
        if not self._decoding.remasking:
            return False
        in_play = self._in_block_BS.any(1).tolist()
        pairs = zip(in_play, self._block_steps, strict=True)
        return any(has_tokens and self._step < steps for has_tokens, steps in pairs)

    def take_step(self, denoiser: Denoiser | WindowedDenoiser, window: Window) -> None:
        """Masks again what is to be revised, then unmasks the tokens of one step."""
        order = self._decoding.order
        if self._decoding.remasking and self._step:
            self._remask()
        counts_B = self._count_due()
        candidate_BS = self._masked_BS
        if order in PLANNED_ORDERS:
            # The order is known, so only the logits of what is unmasked are needed.
            candidate_BS = _select_best(self._planned_BS, candidate_BS, counts_B)
        logits_TV = self._logits.compute(denoiser, self.x_BS, candidate_BS, window)
        if order in PLANNED_ORDERS:
            self._unmask(candidate_BS, logits_TV)
        elif order == "confidence" and self._decoding.temperature:
            # How sure a position is depends on the token that it draws.
            tokens_T = self._choose(logits_TV, candidate_BS)
            probability_T = probability_of(logits_TV, tokens_T)
            unmask_BS = self._select_surest(candidate_BS, probability_T, counts_B)
            kept_T = unmask_BS[candidate_BS]
            self.x_BS[unmask_BS] = tokens_T[kept_T]
            self.probability_BS[unmask_BS] = probability_T[kept_T].float()
        else:
            certainty_T = self._score_certainty(logits_TV)
            unmask_BS = self._select_surest(candidate_BS, certainty_T, counts_B)
            self._unmask(unmask_BS, logits_TV[unmask_BS[candidate_BS]])
        self._step += 1
        if self._decoding.end_token_id is not None:
            self._end_sequences(self._decoding.end_token_id)
        self._find_masked()

    def _find_masked(self) -> None:
        self._masked_BS = self._in_block_BS & (self.x_BS == self._mask_token_id)
        self._num_masked = self._masked_BS.sum(1).tolist()

    def _count_due(self) -> Tensor:
        """How many positions each sequence unmasks in this step, [B]."""
        if self._decoding.order == "ancestral":
            # All positions of the next grid interval in which there is one.
            score_BS = self._planned_BS.masked_fill(~self._masked_BS, -torch.inf)
            next_BS = score_BS == score_BS.amax(1, keepdim=True)
            return (next_BS & self._masked_BS).sum(1)
        if self._decoding.remasking:
            counts = [max(due, 1) for due in self._count_scheduled()]
        else:
            # Evenly over the steps that are left, also after a step that unmasked more.
            counts = [
                -(-masked // max(steps - self._step, 1))
                for masked, steps in zip(self._num_masked, self._block_steps, strict=True)
            ]
        return torch.tensor(counts, device=self.x_BS.device)

    def _count_scheduled(self) -> list[int]:
        """Tokens of each sequence that the schedule has this step unmask."""
        sizes = self._in_block_BS.sum(1).tolist()
        return [
            count_unmasked_after(min(self._step + 1, steps), steps, size) - (size - masked)
            for size, masked, steps in zip(sizes, self._num_masked, self._block_steps, strict=True)
        ]

    def _remask(self) -> None:
        """Masks again a share of what the block has unmasked; at least one if none is left."""
        steps_B = torch.tensor(self._block_steps, device=self.x_BS.device)
        # A sequence whose schedule has ended draws nothing while others of the batch go on.
        revisable_BS = self._in_block_BS & (self._step < steps_B)[:, None]
        unmasked_BS = revisable_BS & ~self._masked_BS
        counts = [
            max(int(self._decoding.remasking * num_unmasked), int(due < 1))
            for num_unmasked, due in zip(
                unmasked_BS.sum(1).tolist(), self._count_scheduled(), strict=True
            )
        ]
        doubt_BS = -self.probability_BS
        if self._decoding.order == "random":
            doubt_BS = self._draw(revisable_BS)
            # What is masked again gets a new place in the order, too.
            self._planned_BS = torch.where(revisable_BS, doubt_BS, self._planned_BS)
        counts_B = torch.tensor(counts, device=self.x_BS.device)
        again_BS = _select_best(doubt_BS, unmasked_BS, counts_B)
        self.x_BS[again_BS] = self._mask_token_id
        self.probability_BS[again_BS] = torch.nan
        self._find_masked()

    def _select_surest(self, candidate_BS: Tensor, score_T: Tensor, counts_B: Tensor) -> Tensor:
        """The candidates that a step unmasks: the best of them, and all beyond the threshold."""
        score_BS = score_T.new_zeros(candidate_BS.shape)
        score_BS[candidate_BS] = score_T
        unmask_BS = _select_best(score_BS, candidate_BS, counts_B)
        threshold = self._decoding.threshold
        if threshold is None:
            return unmask_BS
        least = -threshold if self._decoding.order == "entropy" else threshold
        return unmask_BS | (candidate_BS & (score_BS >= least))

    def _score_certainty(self, logits_TV: Tensor) -> Tensor:
        if self._decoding.order == "entropy":
            return -entropy_of(logits_TV)
        if self._decoding.order == "margin":
            return margin_of(logits_TV)
        # The largest probability alone: finding its token would take longer than all of this.
        best_T: Tensor = logits_TV.softmax(-1).amax(-1)
        return best_T

    def _choose(self, logits_TV: Tensor, where_BS: Tensor) -> Tensor:
        counts = where_BS.sum(1).tolist() if self._decoding.temperature else []
        return choose_tokens(logits_TV, self._decoding, counts, self._generators)

    def _unmask(self, unmask_BS: Tensor, logits_TV: Tensor) -> None:
        tokens_T = self._choose(logits_TV, unmask_BS)
        self.x_BS[unmask_BS] = tokens_T
        self.probability_BS[unmask_BS] = probability_of(logits_TV, tokens_T).float()

    def _draw(self, where_BS: Tensor) -> Tensor:
        """Uniform numbers, float64 [B, S], from each sequence's own stream; 0 elsewhere."""
        result_BS = torch.zeros(where_BS.shape, dtype=torch.float64, device=where_BS.device)
        for b, count in enumerate(where_BS.sum(1).tolist()):
            if count:
                drawn = result_BS.new_empty(count).uniform_(generator=self._generators[b])
                result_BS[b, where_BS[b]] = drawn
        return result_BS

    def _end_sequences(self, end_token_id: int) -> None:
        is_end_BS = self._generated_BS & (self.x_BS == end_token_id)
        is_after_BS = (is_end_BS.cumsum(1) - is_end_BS.long()) > 0
        filled_BS = self._generated_BS & is_after_BS
        self.x_BS.masked_fill_(filled_BS, end_token_id)
        self.probability_BS.masked_fill_(filled_BS, torch.nan)
        # Neither the end nor what follows is revised.
        done_BS = is_end_BS | filled_BS
        self._block_BS.masked_fill_(done_BS, -1)
        self._in_block_BS &= ~done_BS


def _select_best(score_BS: Tensor, candidate_BS: Tensor, counts_B: Tensor) -> Tensor:
    """The candidates with the highest scores; ties go to the leftmost, on every device."""
    score_BS = score_BS.masked_fill(~candidate_BS, -torch.inf)
    order_BS = score_BS.argsort(dim=1, descending=True, stable=True)
    rank_BS = torch.empty_like(order_BS)
    ranks_S = torch.arange(score_BS.shape[1], device=score_BS.device)
    rank_BS.scatter_(1, order_BS, ranks_S.expand_as(order_BS))
    return candidate_BS & (rank_BS < counts_B[:, None])


def _check_guidance(tokens_BS: Tensor | None, decoding: Decoding, x_BS: Tensor) -> Tensor | None:
    """What the other pass of guidance sees; None without guidance."""
    if decoding.guidance_scale == 0.0:
        return None
    if tokens_BS is None:
        raise ValueError(
            f"guidance_scale={decoding.guidance_scale} needs guidance_tokens_BS: pass what its "
            "other pass sees in the prompt's place."
        )
    if tokens_BS.shape != x_BS.shape:
        raise ValueError(
            f"guidance_tokens_BS has the shape {tuple(tokens_BS.shape)} where the tokens have "
            f"{tuple(x_BS.shape)}: give one token per position."
        )
    return tokens_BS


def make_generators(
    seeds: Sequence[int] | None, decoding: Decoding, x_BS: Tensor
) -> list[torch.Generator]:
    """Makes each sequence's stream of random numbers.

    Args:
        seeds: One seed per sequence; None: those of `decoding.seed`.
        decoding: The options.
        x_BS: Tokens [B, S].

    Returns:
        One generator per sequence, on the tokens' device.

    Raises:
        ValueError: The number of seeds is another.
    """
    seeds = derive_seeds(decoding.seed, x_BS.shape[0]) if seeds is None else seeds
    if len(seeds) != x_BS.shape[0]:
        raise ValueError(
            f"There are {len(seeds)} seeds for {x_BS.shape[0]} sequences: pass one per sequence."
        )
    return [torch.Generator(device=x_BS.device).manual_seed(seed) for seed in seeds]


def check_tokens(x_BS: Tensor) -> None:
    """Checks that tokens come as a batch.

    Raises:
        ValueError: They do not have two dimensions.
    """
    if x_BS.dim() != 2:
        raise ValueError(f"The tokens have {x_BS.dim()} dimensions, not 2: pass them as [B, S].")
