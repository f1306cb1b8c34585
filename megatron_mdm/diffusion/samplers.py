"""Samplers that fill the mask tokens of a sequence, given a denoiser. Pure torch, one file.

The file is copied next to the model of every Hugging Face export, so it imports nothing of ours.

Shapes: B batch, S sequence, V logits of a position, M masked positions of one sequence,
N candidate positions of one step, K tokens revealed by one step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor], Tensor]
"""Maps tokens [B, S] (int64, with mask tokens) to logits [B, S, V]; padding is its own affair."""

StepCallback = Callable[[int, Tensor], None]
"""Called after every step with the step's index from 0 and a copy of the tokens [B, S]."""

PLANNED_ORDERS = ("random", "left_to_right", "ancestral")
"""Orders that are known before the first forward pass."""

SCORED_ORDERS = ("confidence", "entropy", "margin")
"""Orders that look at the logits of each step and reveal the surest positions first."""

ORDERS = (*SCORED_ORDERS, *PLANNED_ORDERS)


@dataclass(frozen=True)
class _Step:
    """One reveal: `count` of those `positions_N` which are still masked."""

    positions_N: Tensor
    count: int


@dataclass(frozen=True)
class _Rules:
    """What every choice of a token obeys."""

    mask_token_id: int
    vocab_size: int | None
    temperature: float


def sequence_seeds(seed: int, num_sequences: int) -> list[int]:
    """Derives one seed per sequence; sequence i gets the same seed in a batch of any size.

    Args:
        seed: Seed of the whole batch.
        num_sequences: Number of sequences, at least 0.

    Returns:
        Seeds in [0, 2^64), one per sequence.
    """
    digests = (
        hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in range(num_sequences)
    )
    return [int.from_bytes(digest[:8], "big") for digest in digests]


def reveal_counts(num_masks: int, num_steps: int) -> list[int]:
    """Spreads `num_masks` reveals over at most `num_steps` steps, none of them empty.

    Args:
        num_masks: Number of masked positions, at least 0.
        num_steps: Most steps to use, at least 1.

    Returns:
        min(num_steps, num_masks) positive counts which differ by at most one and sum to
        `num_masks`.
    """
    num_steps = min(num_steps, num_masks)
    if num_steps == 0:
        return []
    base, rest = divmod(num_masks, num_steps)
    return [base + 1] * rest + [base] * (num_steps - rest)


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Combines two passes by classifier-free guidance: u + (w + 1) * (c - u).

    Args:
        conditional: Logits c that saw the prompt, float, any shape.
        unconditional: Logits u that saw mask tokens in the prompt's place, same shape.
        guidance_scale: Weight w; 0 gives back c, -1 gives u.

    Returns:
        Guided logits of the same shape. What c forbids (-inf) stays forbidden.

    Source:
        Nie et al. 2024, "Scaling up Masked Diffusion Models on Text", section 3.2 (unsupervised
        classifier-free guidance).
    """
    guided = unconditional + (guidance_scale + 1.0) * (conditional - unconditional)
    return torch.where(conditional == -torch.inf, conditional, guided)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_BS: Tensor,
    *,
    mask_token_id: int,
    num_steps: int,
    order: str = "confidence",
    temperature: float = 0.0,
    vocab_size: int | None = None,
    guidance_scale: float = 0.0,
    prompt_mask_BS: Tensor | None = None,
    block_length: int | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Fills every mask token of every sequence; all other tokens stay as they are.

    Each sequence follows its own schedule and its own stream of random numbers, so its result
    depends neither on its batch mates nor on its place in the batch. The denoiser runs as often
    as the longest schedule asks (twice as often under guidance); shorter sequences end earlier.

    Args:
        denoiser: Maps tokens [B, S] to logits [B, S, V].
        x_BS: Tokens [B, S], int64; any pattern of mask tokens.
        mask_token_id: Id of the mask token; never chosen.
        num_steps: Most steps per sequence, at least 1. With k masks a sequence takes
            min(num_steps, k) steps that differ by at most one revealed token. "ancestral" reads
            it as the number of grid intervals of t from 1 to 0 instead and skips those in which
            nothing is revealed.
        order: "confidence" (highest probability of the token picked, at temperature 1),
            "entropy" (lowest entropy), "margin" (widest gap between the two best
            probabilities), "random" (uniform order), "left_to_right", or "ancestral" (each mask
            is revealed with probability 1 - s/t when t falls to s).
        temperature: 0 picks the best token; above 0 samples from softmax(logits / temperature).
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        guidance_scale: Weight w of unsupervised classifier-free guidance; 0 is off.
        prompt_mask_BS: Bool [B, S], True where a token is prompt and hidden from the
            unconditional pass; needed when `guidance_scale` is not 0.
        block_length: Fill blocks of this many masked positions from left to right (semi-
            autoregressive); the steps are shared among the blocks. None: one block.
        seeds: One seed per sequence, within 64 bits; default `sequence_seeds(0, B)`.
        callback: Called after every step.

    Returns:
        Filled tokens [B, S], a new tensor.

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 7
        (ancestral); Chang et al. 2022, "MaskGIT", section 3.2 (confidence).
    """
    seeds = sequence_seeds(0, x_BS.shape[0]) if seeds is None else seeds
    _check_arguments(x_BS, num_steps, order, temperature, block_length, seeds)
    if guidance_scale != 0.0 and prompt_mask_BS is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs prompt_mask_BS: pass the prompt's positions."
        )
    rules = _Rules(mask_token_id, vocab_size, temperature)
    x_BS = x_BS.clone()
    generators = [torch.Generator(device=x_BS.device).manual_seed(seed) for seed in seeds]
    plans = [
        _plan_sequence(x_S, mask_token_id, num_steps, order, block_length, generator)
        for x_S, generator in zip(x_BS, generators, strict=True)
    ]
    for call in range(max(map(len, plans), default=0)):
        logits_BSV = denoiser(x_BS)
        uncond_BSV = None
        if guidance_scale != 0.0 and prompt_mask_BS is not None:
            uncond_BSV = denoiser(x_BS.masked_fill(prompt_mask_BS, mask_token_id))
        for b, plan in enumerate(plans):
            if call >= len(plan):
                continue
            positions_N = plan[call].positions_N
            positions_N = positions_N[x_BS[b, positions_N] == mask_token_id]
            logits_NV = logits_BSV[b, positions_N].float()
            if uncond_BSV is not None:
                uncond_NV = uncond_BSV[b, positions_N].float()
                logits_NV = guided_logits(logits_NV, uncond_NV, guidance_scale)
            kept_K, tokens_K = _reveal(logits_NV, plan[call].count, order, rules, generators[b])
            x_BS[b, positions_N[kept_K]] = tokens_K
        if callback is not None:
            callback(call, x_BS.clone())
    return x_BS


@torch.no_grad()
def sample_left_to_right(
    denoiser: Denoiser,
    x_BS: Tensor,
    *,
    max_new_tokens: int,
    mask_token_id: int,
    temperature: float = 0.0,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Continues sequences with a causal model, one token per forward pass.

    Args:
        denoiser: Maps tokens [B, S] to logits [B, S, V] of the next token.
        x_BS: Prompt tokens [B, S], int64, S at least 1.
        max_new_tokens: Most tokens to append, at least 1.
        mask_token_id: Id of the mask token; never chosen.
        temperature: 0 picks the best token; above 0 samples from softmax(logits / temperature).
        vocab_size: Number of real tokens; ids from it on are never chosen. None: all of V.
        eos_token_id: A sequence ends with this token and is filled up with it; the loop stops
            when all have ended. None: no early end.
        seeds: One seed per sequence, within 64 bits; default `sequence_seeds(0, B)`.
        callback: Called after every step.

    Returns:
        Tokens [B, S + n] with n <= `max_new_tokens`.

    Raises:
        ValueError: An argument is out of its range.
    """
    seeds = sequence_seeds(0, x_BS.shape[0]) if seeds is None else seeds
    _check_arguments(x_BS, max_new_tokens, "left_to_right", temperature, None, seeds)
    if x_BS.shape[1] == 0:
        raise ValueError("The prompt has 0 tokens, a causal model needs at least 1: add the EOS.")
    rules = _Rules(mask_token_id, vocab_size, temperature)
    generators = [torch.Generator(device=x_BS.device).manual_seed(seed) for seed in seeds]
    ended_B = torch.zeros(x_BS.shape[0], dtype=torch.bool, device=x_BS.device)
    for step in range(max_new_tokens):
        logits_BV = denoiser(x_BS)[:, -1].float()
        next_tokens = [
            _choose_tokens(_allowed(logits_V[None], rules), temperature, generator)
            for logits_V, generator in zip(logits_BV, generators, strict=True)
        ]
        next_B = torch.cat(next_tokens)
        if eos_token_id is not None:
            next_B = next_B.masked_fill(ended_B, eos_token_id)
            ended_B = ended_B | (next_B == eos_token_id)
        x_BS = torch.cat([x_BS, next_B[:, None]], dim=1)
        if callback is not None:
            callback(step, x_BS.clone())
        if bool(ended_B.all()):
            break
    return x_BS


def _check_arguments(
    x_BS: Tensor,
    num_steps: int,
    order: str,
    temperature: float,
    block_length: int | None,
    seeds: Sequence[int],
) -> None:
    if x_BS.dim() != 2:
        raise ValueError(f"The tokens have {x_BS.dim()} dimensions, not 2: pass them as [B, S].")
    if num_steps < 1:
        raise ValueError(f"The number of steps is {num_steps}, it must be 1 or more.")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown: use one of {', '.join(ORDERS)}.")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and 0 or above.")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length={block_length} must be 1 or more, or None for one block.")
    if len(seeds) != x_BS.shape[0]:
        raise ValueError(
            f"There are {len(seeds)} seeds for {x_BS.shape[0]} sequences: pass one per sequence."
        )


def _plan_sequence(
    x_S: Tensor,
    mask_token_id: int,
    num_steps: int,
    order: str,
    block_length: int | None,
    generator: torch.Generator,
) -> list[_Step]:
    """Lists the reveals of one sequence; their counts sum to its number of masks."""
    positions_M = (x_S == mask_token_id).nonzero().flatten()
    num_masks = len(positions_M)
    if num_masks == 0:
        return []
    if order != "ancestral":
        num_steps = min(num_steps, num_masks)
    blocks = torch.split(positions_M, block_length or num_masks)
    if num_steps < len(blocks):
        raise ValueError(
            f"num_steps={num_steps} is fewer than the {len(blocks)} blocks of "
            f"block_length={block_length}: raise num_steps or block_length."
        )
    steps: list[_Step] = []
    shares = _share_steps([len(block_M) for block_M in blocks], num_steps)
    for block_M, share in zip(blocks, shares, strict=True):
        if order == "ancestral":
            counts = _ancestral_counts(len(block_M), share, generator)
        else:
            counts = reveal_counts(len(block_M), share)
        if order in SCORED_ORDERS:
            steps += [_Step(block_M, count) for count in counts]
            continue
        if order != "left_to_right":
            shuffle_M = torch.randperm(len(block_M), generator=generator, device=block_M.device)
            block_M = block_M[shuffle_M]
        pieces = torch.split(block_M, counts)
        steps += [_Step(piece_K.sort().values, len(piece_K)) for piece_K in pieces]
    return steps


def _share_steps(block_sizes: list[int], num_steps: int) -> list[int]:
    """Gives each block one step and shares the others by size; never more steps than tokens.

    (The last clause holds if `num_steps` <= sum(`block_sizes`).)
    """
    spare_steps = num_steps - len(block_sizes)
    spare_tokens = max(sum(block_sizes) - len(block_sizes), 1)
    shares, seen_tokens = [], 0
    for size in block_sizes:
        before = spare_steps * seen_tokens // spare_tokens
        seen_tokens += size - 1
        shares.append(1 + spare_steps * seen_tokens // spare_tokens - before)
    return shares


def _ancestral_counts(num_masks: int, num_steps: int, generator: torch.Generator) -> list[int]:
    """Draws how many tokens each step of t = 1, 1 - 1/n, .., 0 reveals; empty steps drop out.

    A token that survives to t is revealed by s with probability 1 - s/t, and under the linear
    schedule the product over the grid makes its step uniform on the n steps. The network does not
    see t, so a step that reveals nothing changes nothing.
    """
    device = generator.device
    steps_M = torch.randint(num_steps, (num_masks,), generator=generator, device=device)
    counts: list[int] = torch.unique(steps_M, return_counts=True)[1].tolist()
    return counts


def _reveal(
    logits_NV: Tensor, count: int, order: str, rules: _Rules, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Picks `count` of the N candidates and their tokens: (indices_K into N, tokens_K)."""
    logits_NV = _allowed(logits_NV, rules)
    if order == "confidence":
        tokens_N = _choose_tokens(logits_NV, rules.temperature, generator)
        chosen_N = logits_NV.log_softmax(-1).gather(-1, tokens_N[:, None]).squeeze(-1)
        kept_K = _best(chosen_N, count)
        return kept_K, tokens_N[kept_K]
    if order in SCORED_ORDERS:
        kept_K = _best(_certainty(logits_NV, order), count)
    else:
        kept_K = torch.arange(count, device=logits_NV.device)
    return kept_K, _choose_tokens(logits_NV[kept_K], rules.temperature, generator)


def _allowed(logits_NV: Tensor, rules: _Rules) -> Tensor:
    """Cuts the ids beyond the vocabulary and forbids the mask token."""
    logits_NV = logits_NV[:, : rules.vocab_size].clone()
    if rules.mask_token_id < logits_NV.shape[-1]:
        logits_NV[:, rules.mask_token_id] = -torch.inf
    return logits_NV


def _certainty(logits_NV: Tensor, order: str) -> Tensor:
    probs_NV = logits_NV.softmax(-1)
    if order == "entropy":
        entropy_N: Tensor = torch.special.entr(probs_NV).sum(-1)
        return -entropy_N
    best_N2 = probs_NV.topk(min(2, probs_NV.shape[-1]), dim=-1).values
    return best_N2[:, 0] - best_N2[:, -1]


def _best(score_N: Tensor, count: int) -> Tensor:
    """Indices of the highest scores; ties go to the leftmost, on every device."""
    return score_N.argsort(descending=True, stable=True)[:count].sort().values


def _choose_tokens(logits_NV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Picks one token per row by Gumbel-max, or the best at temperature 0.

    The noise is float64: in float32 its upper tail is cut short, which lowers the effective
    temperature.
    """
    if temperature == 0.0:
        return logits_NV.argmax(-1)
    uniform_NV = torch.rand(
        logits_NV.shape, dtype=torch.float64, device=logits_NV.device, generator=generator
    )
    return (logits_NV.double() / temperature - (-uniform_NV.log()).log()).argmax(-1)
