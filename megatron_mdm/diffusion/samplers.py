"""Samplers: they unmask the mask tokens of a sequence, given a denoiser. Pure torch.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.

Every decision is one of a single sequence: its order, its number of tokens per step and its random
numbers depend neither on its batch mates nor on its place in the batch. The batch only shares the
forward passes.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import Decoding
from .sampler_state import (
    Denoiser,
    SamplerState,
    Window,
    WindowedDenoiser,
    check_tokens,
    make_generators,
)
from .token_choice import choose_tokens, probability_of, restrict_logits


class SamplingStep(NamedTuple):
    """The state after a step.

    Attributes:
        step: Number of the step, from 0.
        x_BS: Tokens [B, S], a copy.
        probability_BS: float32 [B, S], the probability with which each generated token was chosen,
            at temperature 1; NaN where nothing was chosen.
    """

    step: int
    x_BS: Tensor
    probability_BS: Tensor


StepCallback = Callable[[SamplingStep], None]
"""Called after every step."""


@torch.no_grad()
def sample(
    denoiser: Denoiser | WindowedDenoiser,
    x_BS: Tensor,
    decoding: Decoding,
    *,
    mask_token_id: int,
    vocab_size: int | None = None,
    guidance_tokens_BS: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Unmasks every mask token of every sequence; all other tokens stay as they are.

    The sequences go through their blocks together. In each block the denoiser runs as often as the
    longest schedule among them asks, once per step; under guidance with [2B, S], the sequences and
    then the same with the prompt hidden.

    Args:
        denoiser: Maps tokens to logits.
        x_BS: Tokens [B, S], int64; any pattern of mask tokens.
        decoding: Order, steps, blocks, choice of tokens; what is left open is that of a gap.
        mask_token_id: Id of the mask token; never chosen.
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        guidance_tokens_BS: int64 [B, S], what the other pass of guidance sees at the positions
            that are not generated; not needed without guidance.
        seeds: One seed per sequence, within 64 bits; None: those of `decoding.seed`.
        callback: Called after every step.

    Returns:
        Tokens without masks [B, S], a new tensor.

    Raises:
        ValueError: The arguments do not fit each other.
    """
    decoding = decoding.resolve(continues=False)
    state = SamplerState(x_BS, decoding, mask_token_id, vocab_size, guidance_tokens_BS, seeds)
    num_calls = 0
    for block in range(state.num_blocks):
        window = state.enter_block(block)
        while state.is_unfinished():
            state.take_step(denoiser, window)
            if callback is not None:
                callback(SamplingStep(num_calls, state.x_BS.clone(), state.probability_BS.clone()))
            window = window._replace(step=window.step + 1)
            num_calls += 1
    return state.x_BS


@torch.no_grad()
def sample_left_to_right(
    denoiser: Denoiser | WindowedDenoiser,
    x_BS: Tensor,
    decoding: Decoding,
    *,
    mask_token_id: int,
    vocab_size: int | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Continues sequences with a causal model, one token per forward pass.

    Args:
        denoiser: Maps tokens to logits of the next token. A `WindowedDenoiser` is asked for column
            `window.stop` - 1 and must not look beyond it.
        x_BS: Prompt tokens [B, P], int64, P at least 1.
        decoding: Choice of tokens, how many at most, and the token that ends a sequence. What
            follows that token is the same token again; the loop stops when all have ended.
        mask_token_id: Id of the mask token; never chosen.
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        seeds: One seed per sequence, within 64 bits; None: those of `decoding.seed`.
        callback: Called after every step with the tokens so far, [B, P + steps].

    Returns:
        Tokens [B, P + n] with n <= `decoding.max_new_tokens`.

    Raises:
        ValueError: An argument is out of its range, or an option is for masked diffusion.
    """
    decoding.check_autoregressive()
    decoding = decoding.resolve(continues=True)
    check_tokens(x_BS)
    num_sequences, length = x_BS.shape
    if length == 0:
        raise ValueError("The prompt has 0 tokens, a causal model needs at least 1: add the EOS.")
    generators = make_generators(seeds, decoding, x_BS)
    forbidden = (mask_token_id, *decoding.forbidden_token_ids)
    x_BS = F.pad(x_BS, (0, decoding.max_new_tokens), value=mask_token_id)
    probability_BS = torch.full(x_BS.shape, torch.nan, device=x_BS.device)
    ended_B = torch.zeros(num_sequences, dtype=torch.bool, device=x_BS.device)
    first = length
    for stop in range(first, x_BS.shape[1]):
        window = Window(0 if stop == first else stop - 1, stop, stop - first)
        logits_BV = _get_next_logits(denoiser, x_BS, window)
        logits_BV = restrict_logits(logits_BV, vocab_size, forbidden)
        next_B = choose_tokens(logits_BV, decoding, [1] * num_sequences, generators)
        probability_BS[:, stop] = probability_of(logits_BV, next_B).float()
        if decoding.end_token_id is not None:
            next_B = next_B.masked_fill(ended_B, decoding.end_token_id)
            probability_BS[:, stop].masked_fill_(ended_B, torch.nan)
            ended_B = ended_B | (next_B == decoding.end_token_id)
        x_BS[:, stop] = next_B
        length = stop + 1
        if callback is not None:
            seen = x_BS[:, :length].clone(), probability_BS[:, :length].clone()
            callback(SamplingStep(stop - first, *seen))
        if bool(ended_B.all()):
            break
    return x_BS[:, :length].clone()


def _get_next_logits(denoiser: Denoiser | WindowedDenoiser, x_BS: Tensor, window: Window) -> Tensor:
    """Logits [B, V] of the token at column `window.stop`."""
    if isinstance(denoiser, WindowedDenoiser):
        needed_BS = torch.zeros_like(x_BS, dtype=torch.bool)
        needed_BS[:, window.stop - 1] = True
        return denoiser.logits_at(x_BS, needed_BS, window)
    return denoiser(x_BS[:, : window.stop])[:, -1]
