"""A batch of sequences while its masks are being filled, step by step.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decoding import PLANNED_ORDERS, Decoding, revealed_after, sequence_seeds, share_steps
from .denoisers import Denoiser, GuidedDenoiser, Window, WindowedDenoiser, needed_logits
from .token_choice import (
    allowed_logits,
    choose_tokens,
    entropy_of,
    guided_logits,
    margin_of,
    probability_of,
)


class Filling:
    """The state of a batch that is being filled. See `sample` for the arguments."""

    def __init__(
        self,
        x_BS: Tensor,
        decoding: Decoding,
        mask_token_id: int,
        vocab_size: int | None,
        seeds: Sequence[int] | None,
    ) -> None:
        check_tokens(x_BS)
        self.x_BS = x_BS.clone()
        self.probability_BS = torch.full(x_BS.shape, torch.nan, device=x_BS.device)
        self._decoding = decoding
        self._mask_token_id = mask_token_id
        self._vocab_size = vocab_size
        self._forbidden = (mask_token_id, *decoding.forbidden_token_ids)
        self._generators = generators_of(seeds, x_BS)
        self._generated_BS = x_BS == mask_token_id
        self._hidden_BS: Tensor | None = None
        rank_BS = self._generated_BS.cumsum(1) - 1
        masks = self._generated_BS.sum(1).tolist()
        length = decoding.block_length or max([*masks, 1])
        # The block of each position that is still in play, -1 elsewhere.
        self._block_BS = torch.where(self._generated_BS, rank_BS // length, -1)
        self._steps = [_steps_of_blocks(count, length, decoding) for count in masks]
        self.num_blocks = max(map(len, self._steps), default=0)
        self._num_masked: list[int] = []
        self._score_BS = self._planned_scores()

    def hide_prompt(self, prompt_mask_BS: Tensor | None, tokens_BS: Tensor | None) -> None:
        """Sets the tokens of the unconditional pass at the positions that are not generated."""
        scale = self._decoding.guidance_scale
        if tokens_BS is not None:
            if tokens_BS.shape != self.x_BS.shape:
                raise ValueError(
                    f"guidance_tokens_BS has the shape {tuple(tokens_BS.shape)} where the tokens "
                    f"have {tuple(self.x_BS.shape)}: give one token per position."
                )
            self._hidden_BS = tokens_BS
        elif prompt_mask_BS is not None:
            self._hidden_BS = self.x_BS.masked_fill(prompt_mask_BS, self._mask_token_id)
        else:
            raise ValueError(
                f"guidance_scale={scale} needs prompt_mask_BS: pass the prompt's positions."
            )

    def enter(self, block: int) -> Window:
        """Begins a block, and returns its columns over all sequences."""
        self._in_block_BS = self._block_BS == block
        self._block_steps = [steps[block] if block < len(steps) else 1 for steps in self._steps]
        self._step = 0
        columns = self._in_block_BS.any(0).nonzero().flatten()
        if len(columns) == 0:
            # Every sequence has ended before this block.
            self._num_masked = [0] * len(self._steps)
            return Window(0, 0, 0)
        self._count_masked()
        return Window(int(columns[0]), int(columns[-1]) + 1, 0)

    def is_open(self) -> bool:
        """Does the block still have masks, or steps to revise what it has revealed?"""
        if any(self._num_masked):
            return True
        if not self._decoding.remasking:
            return False
        in_play = self._in_block_BS.any(1).tolist()
        pairs = zip(in_play, self._block_steps, strict=True)
        return any(has_tokens and self._step < steps for has_tokens, steps in pairs)

    def take_step(self, denoiser: Denoiser | WindowedDenoiser, window: Window) -> None:
        """Masks again what is to be revised, then reveals the tokens of one step."""
        if self._decoding.remasking and self._step:
            self._remask()
        candidate_BS = self._masked_BS
        counts_B = self._counts()
        if self._decoding.order in PLANNED_ORDERS:
            # Known beforehand, so only the logits of what is revealed are needed.
            candidate_BS = _best(self._score_BS, candidate_BS, counts_B)
        logits_TV = self._logits(denoiser, candidate_BS, window)
        if self._decoding.order == "confidence" and self._decoding.temperature:
            # How sure a position is depends on the token that it draws.
            tokens_T = self._choose(logits_TV, candidate_BS)
            probability_T = probability_of(logits_TV, tokens_T)
            reveal_BS = self._surest(candidate_BS, probability_T, counts_B)
            kept_T = reveal_BS[candidate_BS]
            tokens_T, probability_T = tokens_T[kept_T], probability_T[kept_T]
        else:
            reveal_BS = candidate_BS
            if self._decoding.order not in PLANNED_ORDERS:
                score_T = self._certainty(logits_TV)
                reveal_BS = self._surest(candidate_BS, score_T, counts_B)
                logits_TV = logits_TV[reveal_BS[candidate_BS]]
            tokens_T = self._choose(logits_TV, reveal_BS)
            probability_T = probability_of(logits_TV, tokens_T)
        self.x_BS[reveal_BS] = tokens_T
        self.probability_BS[reveal_BS] = probability_T.float()
        self._step += 1
        if self._decoding.end_token_id is not None:
            self._end_sequences(self._decoding.end_token_id)
        self._count_masked()

    def _count_masked(self) -> None:
        self._masked_BS = self._in_block_BS & (self.x_BS == self._mask_token_id)
        self._num_masked = self._masked_BS.sum(1).tolist()

    def _counts(self) -> Tensor:
        """How many positions each sequence reveals in this step, [B]."""
        if self._decoding.order == "ancestral":
            # All positions of the next grid interval in which there is one.
            score_BS = self._score_BS.masked_fill(~self._masked_BS, -torch.inf)
            next_BS = score_BS == score_BS.amax(1, keepdim=True)
            return (next_BS & self._masked_BS).sum(1)
        in_play = self._in_block_BS.sum(1).tolist() if self._decoding.remasking else None
        counts = []
        for b, num_masked in enumerate(self._num_masked):
            num_steps = self._block_steps[b]
            if in_play is None:
                # Evenly over the steps that are left, also after a step that revealed more.
                counts.append(-(-num_masked // max(num_steps - self._step, 1)))
                continue
            step = min(self._step + 1, num_steps)
            target = revealed_after(step, num_steps, in_play[b])
            counts.append(max(target - (in_play[b] - num_masked), 1))
        return torch.tensor(counts, device=self.x_BS.device)

    def _remask(self) -> None:
        """Masks again a share of what the block has revealed; at least one if none is left."""
        steps_B = torch.tensor(self._block_steps, device=self.x_BS.device)
        # A sequence whose schedule is over waits for its mates, and draws nothing meanwhile.
        revisable_BS = self._in_block_BS & (self._step < steps_B)[:, None]
        revealed_BS = revisable_BS & ~self._masked_BS
        counts = []
        for b, num_revealed in enumerate(revealed_BS.sum(1).tolist()):
            share = int(self._decoding.remasking * num_revealed)
            total = num_revealed + self._num_masked[b]
            step = min(self._step + 1, self._block_steps[b])
            due = revealed_after(step, self._block_steps[b], total) - num_revealed
            counts.append(max(share, int(due < 1)))
        doubt_BS = -self.probability_BS
        if self._decoding.order == "random":
            doubt_BS = self._draw(revisable_BS)
            # A new place in the order, too, for what comes back.
            self._score_BS = torch.where(revisable_BS, doubt_BS, self._score_BS)
        counts_B = torch.tensor(counts, device=self.x_BS.device)
        again_BS = _best(doubt_BS, revealed_BS, counts_B)
        self.x_BS[again_BS] = self._mask_token_id
        self.probability_BS[again_BS] = torch.nan
        self._count_masked()

    def _logits(
        self, denoiser: Denoiser | WindowedDenoiser, needed_BS: Tensor, window: Window
    ) -> Tensor:
        if self._hidden_BS is None:
            logits_TV = needed_logits(denoiser, self.x_BS, needed_BS, window)
            return allowed_logits(logits_TV, self._vocab_size, self._forbidden)
        hidden_BS = torch.where(self._generated_BS, self.x_BS, self._hidden_BS)
        both_2BS = torch.cat([self.x_BS, hidden_BS])
        needed_2BS = torch.cat([needed_BS, needed_BS])
        scale = self._decoding.guidance_scale
        if isinstance(denoiser, GuidedDenoiser):
            logits_TV = denoiser.guided_logits_at(both_2BS, needed_2BS, window, scale)
        else:
            logits_2TV = needed_logits(denoiser, both_2BS, needed_2BS, window)
            seeing_TV, blind_TV = allowed_logits(logits_2TV, self._vocab_size).chunk(2)
            logits_TV = guided_logits(seeing_TV, blind_TV, scale)
        # Forbidden at the end, in half as many logits.
        return allowed_logits(logits_TV, self._vocab_size, self._forbidden)

    def _surest(self, candidate_BS: Tensor, score_T: Tensor, counts_B: Tensor) -> Tensor:
        score_BS = score_T.new_zeros(candidate_BS.shape)
        score_BS[candidate_BS] = score_T
        reveal_BS = _best(score_BS, candidate_BS, counts_B)
        threshold = self._decoding.threshold
        if threshold is None:
            return reveal_BS
        least = -threshold if self._decoding.order == "entropy" else threshold
        return reveal_BS | (candidate_BS & (score_BS >= least))

    def _certainty(self, logits_TV: Tensor) -> Tensor:
        if self._decoding.order == "entropy":
            return -entropy_of(logits_TV)
        if self._decoding.order == "margin":
            return margin_of(logits_TV)
        # Without the token, whose search takes longer than all of this.
        best_T: Tensor = logits_TV.softmax(-1).amax(-1)
        return best_T

    def _choose(self, logits_TV: Tensor, where_BS: Tensor) -> Tensor:
        counts = where_BS.sum(1).tolist() if self._decoding.temperature else []
        return choose_tokens(logits_TV, self._decoding, counts, self._generators)

    def _planned_scores(self) -> Tensor:
        """Scores of the positions in an order that is known beforehand; the highest comes first."""
        order = self._decoding.order
        if order == "left_to_right":
            columns_S = torch.arange(self.x_BS.shape[1], device=self.x_BS.device)
            return -columns_S.double().expand_as(self.x_BS)
        score_BS = torch.zeros(self.x_BS.shape, dtype=torch.float64, device=self.x_BS.device)
        if order == "random":
            return self._draw(self._generated_BS)
        if order == "ancestral":
            # A token that survives to t is revealed by s with probability 1 - s/t, and under the
            # linear schedule the product over the grid makes its interval uniform on all of them.
            # The network does not see t, so an interval that reveals nothing changes nothing.
            steps_BS = torch.ones_like(score_BS)
            for b, steps in enumerate(self._steps):
                for block, num_steps in enumerate(steps):
                    steps_BS[b, self._block_BS[b] == block] = num_steps
            score_BS = -(self._draw(self._generated_BS) * steps_BS).floor()
        return score_BS

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


def _steps_of_blocks(num_masks: int, block_length: int, decoding: Decoding) -> list[int]:
    """Steps of each block of one sequence."""
    sizes = [min(block_length, num_masks - start) for start in range(0, num_masks, block_length)]
    num_steps = num_masks if decoding.num_steps is None else decoding.num_steps
    if decoding.order != "ancestral" and not decoding.remasking:
        num_steps = min(num_steps, num_masks)
    if num_steps < len(sizes):
        raise ValueError(
            f"num_steps={num_steps} is fewer than the {len(sizes)} blocks of "
            f"block_length={block_length}: raise num_steps or block_length."
        )
    return share_steps(sizes, num_steps) if sizes else []


def _best(score_BS: Tensor, candidate_BS: Tensor, counts_B: Tensor) -> Tensor:
    """The candidates with the highest scores; ties go to the leftmost, on every device."""
    score_BS = score_BS.masked_fill(~candidate_BS, -torch.inf)
    order_BS = score_BS.argsort(dim=1, descending=True, stable=True)
    rank_BS = torch.empty_like(order_BS)
    ranks_S = torch.arange(score_BS.shape[1], device=score_BS.device)
    rank_BS.scatter_(1, order_BS, ranks_S.expand_as(order_BS))
    return candidate_BS & (rank_BS < counts_B[:, None])


def generators_of(seeds: Sequence[int] | None, x_BS: Tensor) -> list[torch.Generator]:
    """Makes each sequence's stream of random numbers.

    Args:
        seeds: One seed per sequence; None: `sequence_seeds(0, B)`.
        x_BS: Tokens [B, S].

    Returns:
        One generator per sequence, on the tokens' device.

    Raises:
        ValueError: The number of seeds is another.
    """
    seeds = sequence_seeds(0, x_BS.shape[0]) if seeds is None else seeds
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
