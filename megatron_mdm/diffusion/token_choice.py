"""Which token a position gets, given its logits.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.

Shapes: T positions, V logits of a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decoding import Decoding


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Combines two passes by classifier-free guidance: u + (w + 1) * (c - u).

    Args:
        conditional: Logits c that saw the prompt, float, any shape.
        unconditional: Logits u that did not, same shape.
        guidance_scale: Weight w; 0 gives back c, -1 gives u.

    Returns:
        Guided logits of the same shape. What c or u forbids (-inf) is forbidden.

    Source:
        Nie et al. 2024, "Scaling up Masked Diffusion Models on Text", section 3.2 (unsupervised
        classifier-free guidance).
    """
    # In place after the first operation: logits are large, and memory traffic is the cost.
    guided = conditional - unconditional
    guided.mul_(guidance_scale + 1.0).add_(unconditional)
    return guided.nan_to_num_(-torch.inf, torch.inf, -torch.inf)


def restrict_logits(
    logits_TV: Tensor, vocab_size: int | None, forbidden_token_ids: Sequence[int] = ()
) -> Tensor:
    """Cuts the ids beyond the vocabulary and forbids tokens, in float32 or wider.

    Args:
        logits_TV: float [T, V].
        vocab_size: Number of real tokens; None: all of V.
        forbidden_token_ids: Ids that must not be chosen.

    Returns:
        float32 or float64 [T, `vocab_size`], -inf at the forbidden ids.
    """
    logits_TV = logits_TV[:, :vocab_size]
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    inside = [index for index in forbidden_token_ids if index < logits_TV.shape[-1]]
    if inside:
        ids = torch.tensor(inside, device=logits_TV.device)
        logits_TV = logits_TV.index_fill(-1, ids, -torch.inf)
    return logits_TV


def choose_tokens(
    logits_TV: Tensor,
    decoding: Decoding,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draws one token per position from the softmax, or takes the best at temperature 0.

    One float64 number per position is looked up in the cumulative probabilities. Gumbel-max noise
    in float64 gives the same distribution, and needs a number per token of the vocabulary. In
    float32 Gumbel-max draws rare tokens too seldom, and cumulative probabilities near 1 merge
    tokens of less than 6e-8.

    Args:
        logits_TV: float [T, V], grouped by sequence.
        decoding: Gives temperature, top_k and top_p.
        counts: Positions of each sequence; they sum to T. Not looked at at temperature 0.
        generators: Stream of random numbers of each sequence; one without positions draws nothing.

    Returns:
        int64 [T].
    """
    if not decoding.temperature:
        return logits_TV.argmax(-1)
    cumulative_TV = scale_logits(logits_TV, decoding).softmax(-1).cumsum(-1, dtype=torch.float64)
    total_T = cumulative_TV[:, -1]
    drawn_T = torch.empty_like(total_T)
    for rows, generator in zip(torch.split(drawn_T, list(counts)), generators, strict=True):
        if len(rows):
            rows.uniform_(generator=generator)
    # A draw that rounds to the total would lie behind the last token with any probability.
    drawn_T = torch.minimum(drawn_T * total_T, torch.nextafter(total_T, torch.zeros_like(total_T)))
    return torch.searchsorted(cumulative_TV, drawn_T[:, None], right=True).squeeze(-1)


def scale_logits(logits_TV: Tensor, decoding: Decoding) -> Tensor:
    """Logits of the distribution that tokens are drawn from.

    Args:
        logits_TV: float [T, V].
        decoding: Gives a temperature above 0, top_k and top_p.

    Returns:
        float [T, V], -inf at what is never drawn.
    """
    assert decoding.temperature
    scaled_TV = logits_TV / decoding.temperature
    if decoding.top_k is not None:
        scaled_TV = _keep_top_k(scaled_TV, decoding.top_k)
    if decoding.top_p is not None:
        scaled_TV = _keep_top_p(scaled_TV, decoding.top_p)
    return scaled_TV


def probability_of(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Probability of one token per position under the softmax of its logits.

    Args:
        logits_TV: float [T, V].
        tokens_T: int64 [T].

    Returns:
        float [T].
    """
    chosen_T = logits_TV.gather(-1, tokens_T[:, None]).squeeze(-1)
    return (chosen_T - logits_TV.logsumexp(-1)).exp()


def entropy_of(logits_TV: Tensor) -> Tensor:
    """Entropy of the softmax of each position's logits.

    Args:
        logits_TV: float [T, V].

    Returns:
        float [T], nats.
    """
    entropy_T: Tensor = torch.special.entr(logits_TV.softmax(-1)).sum(-1)
    return entropy_T


def margin_of(logits_TV: Tensor) -> Tensor:
    """Gap between the two best probabilities of each position.

    Args:
        logits_TV: float [T, V].

    Returns:
        float [T].
    """
    best_T2 = logits_TV.softmax(-1).topk(min(2, logits_TV.shape[-1]), dim=-1).values
    return best_T2[:, 0] - best_T2[:, -1]


def _keep_top_k(logits_TV: Tensor, top_k: int) -> Tensor:
    kept_TK = logits_TV.topk(min(top_k, logits_TV.shape[-1]), dim=-1)
    result_TV = torch.full_like(logits_TV, -torch.inf)
    return result_TV.scatter(-1, kept_TK.indices, kept_TK.values)


def _keep_top_p(logits_TV: Tensor, top_p: float) -> Tensor:
    sorted_TV = logits_TV.sort(dim=-1, descending=True, stable=True)
    probs_TV = sorted_TV.values.softmax(-1)
    # A token is left out when those before it reach p already; the first one never is.
    reached_TV = (probs_TV.cumsum(-1) - probs_TV) >= top_p
    reached_TV[:, 0] = False
    kept_TV = sorted_TV.values.masked_fill(reached_TV, -torch.inf)
    return torch.empty_like(logits_TV).scatter(-1, sorted_TV.indices, kept_TV)
