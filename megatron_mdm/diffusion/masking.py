"""Masks of absorbing diffusion: which tokens are hidden, and what each one weighs.

Both forms bound the negative log-likelihood by the same expectation. Weights are such that
`sum(weights * cross_entropy) / length` is a sample's loss in nats per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.noise import FloatArray
from megatron_mdm.diffusion.schedules import LINEAR, NoiseSchedule


class Masking(NamedTuple):
    """One draw of the forward process.

    Attributes:
        mask_L: bool [L], True where the token is replaced by the mask token.
        weight: Weight of each masked token's cross-entropy in the bound on the sum over L tokens.
    """

    mask_L: NDArray[np.bool_]
    weight: float


def masking_probability(share: float, eps: float) -> float:
    """Probability that a token is masked.

    Args:
        share: m(t) = 1 - alpha_t in [0, 1]; t itself for the linear schedule.
        eps: Probability at t = 0, in [0, 1).

    Returns:
        p = (1 - eps) m + eps.

    Source:
        arXiv 2410.18514, section 2.
    """
    return (1.0 - eps) * share + eps


def bernoulli_masking(
    uniforms_L: FloatArray, t: float, eps: float, schedule: NoiseSchedule = LINEAR
) -> Masking:
    """Masks every token independently with probability p = (1 - eps) m(t) + eps.

    Args:
        uniforms_L: Independent draws from U[0, 1), float64 [L].
        t: Time in (0, 1].
        eps: Least masking probability, in [0, 1).
        schedule: m(t), and the weighting.

    Returns:
        The mask and the weight: m'(t) / p for the bound, 1 over the mean p for equal weights.

    Source:
        arXiv 2410.18514, equation 3, with the linear schedule.
    """
    probability = masking_probability(schedule.masked_share(t), eps)
    if schedule.weighting == "equal":
        weight = 1.0 / masking_probability(schedule.mean_share(), eps)
    else:
        weight = schedule.slope(t) / probability
    return Masking(uniforms_L < probability, weight)


def fixed_count_masking(
    uniforms_L: FloatArray, t: float, schedule: NoiseSchedule = LINEAR
) -> Masking:
    """Masks exactly l = ceil(m(t) L) tokens, a uniform choice of positions.

    For t ~ U(0, 1] and m(t) = t, l is uniform over 1..L. The expectation is that of the Bernoulli
    form with eps = 0, with much less variance: no draw is empty, and no weight depends on how many
    tokens happened to be masked.

    Args:
        uniforms_L: Independent draws from U[0, 1), float64 [L]. The l smallest are masked.
        t: Time in (0, 1].
        schedule: m(t), and the weighting.

    Returns:
        The mask and the weight: for the bound 1 / (l P(l)), where P(l) is the chance of l under
        t ~ U(0, 1], which is L / l when m(t) = t; L over the mean l for equal weights.

    Source:
        The any-order autoregressive form of the bound (arXiv 2410.18514, section 2).
    """
    length = len(uniforms_L)
    count = min(length, max(1, int(np.ceil(schedule.masked_share(t) * length))))
    mask_L = np.zeros(length, dtype=np.bool_)
    mask_L[np.argpartition(uniforms_L, count - 1)[:count]] = True
    if schedule.weighting == "equal":
        return Masking(mask_L, length / schedule.mean_count(length))
    return Masking(mask_L, schedule.count_weight(count, length))
