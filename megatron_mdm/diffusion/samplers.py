"""Samplers that fill the mask tokens of a sequence, given a denoiser. Pure torch.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.

Every decision is one of a single sequence: its order, its number of tokens a step and its random
numbers depend neither on its batch mates nor on its place in the batch. The batch only shares the
forward passes.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .decoding import Decoding
from .denoisers import Denoiser, Window, WindowedDenoiser, next_logits
from .filling import Filling, check_tokens, generators_of
from .token_choice import allowed_logits, choose_tokens, probability_of


class Reveal(NamedTuple):
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


StepCallback = Callable[[Reveal], None]
"""Called after every step."""


@torch.no_grad()
def sample(
    denoiser: Denoiser | WindowedDenoiser,
    x_BS: Tensor,
    decoding: Decoding,
    *,
    mask_token_id: int,
    vocab_size: int | None = None,
    prompt_mask_BS: Tensor | None = None,
    guidance_tokens_BS: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Fills every mask token of every sequence; all other tokens stay as they are.

    The sequences go through their blocks together. In each block the denoiser runs as often as the
    longest schedule among them asks, once per step; under guidance with [2B, S], the sequences and
    then the same with the prompt hidden.

    Args:
        denoiser: Maps tokens to logits.
        x_BS: Tokens [B, S], int64; any pattern of mask tokens.
        decoding: Order, steps, blocks, choice of tokens.
        mask_token_id: Id of the mask token; never chosen.
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        prompt_mask_BS: Bool [B, S], True where a token is prompt and hidden from the unconditional
            pass; needed under guidance unless `guidance_tokens_BS` is given.
        guidance_tokens_BS: int64 [B, S], tokens of the unconditional pass at the positions that
            are not generated; None: the sequence with mask tokens in the prompt's place.
        seeds: One seed per sequence, within 64 bits; default `sequence_seeds(0, B)`.
        callback: Called after every step.

    Returns:
        Filled tokens [B, S], a new tensor.

    Raises:
        ValueError: The arguments do not fit each other.
    """
    run = Filling(x_BS, decoding, mask_token_id, vocab_size, seeds)
    if decoding.guidance_scale != 0.0:
        run.hide_prompt(prompt_mask_BS, guidance_tokens_BS)
    num_calls = 0
    for block in range(run.num_blocks):
        window = run.enter(block)
        step = 0
        while run.is_open():
            run.take_step(denoiser, window._replace(step=step))
            if callback is not None:
                callback(Reveal(num_calls, run.x_BS.clone(), run.probability_BS.clone()))
            step, num_calls = step + 1, num_calls + 1
    return run.x_BS


@torch.no_grad()
def sample_left_to_right(
    denoiser: Denoiser | WindowedDenoiser,
    x_BS: Tensor,
    decoding: Decoding,
    *,
    max_new_tokens: int,
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
        decoding: Choice of tokens, and the token that ends a sequence: it is filled up with it, and
            the loop stops when all have ended.
        max_new_tokens: Most tokens to append, at least 1.
        mask_token_id: Id of the mask token; never chosen.
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        seeds: One seed per sequence, within 64 bits; default `sequence_seeds(0, B)`.
        callback: Called after every step with the tokens so far, [B, P + steps].

    Returns:
        Tokens [B, P + n] with n <= `max_new_tokens`.

    Raises:
        ValueError: An argument is out of its range, or an option is for masked diffusion.
    """
    decoding.check_autoregressive()
    check_tokens(x_BS)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    num_sequences, length = x_BS.shape
    if length == 0:
        raise ValueError("The prompt has 0 tokens, a causal model needs at least 1: add the EOS.")
    generators = generators_of(seeds, x_BS)
    forbidden = (mask_token_id, *decoding.forbidden_token_ids)
    x_BS = torch.cat([x_BS, x_BS.new_full((num_sequences, max_new_tokens), mask_token_id)], dim=1)
    probability_BS = torch.full(x_BS.shape, torch.nan, device=x_BS.device)
    ended_B = torch.zeros(num_sequences, dtype=torch.bool, device=x_BS.device)
    first = length
    for stop in range(first, first + max_new_tokens):
        window = Window(0 if stop == first else stop - 1, stop, stop - first)
        logits_BV = next_logits(denoiser, x_BS, window)
        logits_BV = allowed_logits(logits_BV, vocab_size, forbidden)
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
            callback(Reveal(stop - first, *seen))
        if bool(ended_B.all()):
            break
    return x_BS[:, :length].clone()
