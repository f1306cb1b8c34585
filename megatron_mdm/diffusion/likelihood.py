"""Estimators of the negative log-likelihood, with standard errors, over any denoiser.

A denoiser is a function from tokens int64 [B, S] to logits float [B, S, V]. The mask token takes
part in no softmax: a denoiser that has a logit for it must return -inf there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.diffusion.masking import Masking, bernoulli_masking, fixed_count_masking
from megatron_mdm.diffusion.noise import (
    CounterNoise,
    FloatArray,
    Purpose,
    spread_times,
    van_der_corput_ranks,
)

Denoiser = Callable[[Tensor], Tensor]

# Keeps the bank's draws apart from a training run's with the same seed.
VALIDATION_DOMAIN = 1
_LEAST_FOR_A_CUBIC = 16


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
        mean: The estimate, in the unit of what was averaged.
        standard_error: Its standard error; nan for a single sample.
    """

    mean: float
    standard_error: float


class ClusteredEstimate(NamedTuple):
    """A mean over values that come in clusters, such as windows of documents.

    Attributes:
        mean: The estimate, in the unit of what was averaged.
        standard_error: Its standard error if all values are independent; nan for one value.
        clustered_error: Its standard error if clusters are independent; nan for one cluster.
    """

    mean: float
    standard_error: float
    clustered_error: float


def clustered_mean(
    values_N: NDArray[np.float64],
    clusters_N: NDArray[np.int64],
    times_NK: NDArray[np.float64] | None = None,
) -> ClusteredEstimate:
    """Mean with both of its errors.

    Args:
        values_N: As for `mean_with_standard_error`.
        clusters_N: int64 [N], number of each value's cluster.
        times_NK: As for `mean_with_standard_error`.

    Returns:
        The estimate.
    """
    mean, error = mean_with_standard_error(values_N, times_NK)
    return ClusteredEstimate(mean, error, clustered_error(values_N, clusters_N, times_NK))


def mean_with_standard_error(
    values_N: NDArray[np.float64], times_NK: NDArray[np.float64] | None = None
) -> Estimate:
    """Mean of independent values.

    Where t is stratified, what a value owes to its t adds nothing to the error of the mean. The
    smooth part of it, a cubic in t, is taken out of the spread by least squares; what a cubic
    misses stays in, so the figure errs on the safe side.

    Args:
        values_N: float64 [N], each a mean over K draws.
        times_NK: float64 [N, K], the draws' t, stratified over all N K draws; None if there is no
            t, or it is independent.

    Returns:
        Mean and standard error; the plain standard error with fewer than 16 values.
    """
    mean, count = float(values_N.mean()), len(values_N)
    if count < 2:
        return Estimate(mean, math.nan)
    residual_N = _residuals(values_N, times_NK)
    return Estimate(mean, math.sqrt(float(residual_N @ residual_N) / (count - 1) / count))


def clustered_error(
    values_N: NDArray[np.float64],
    clusters_N: NDArray[np.int64],
    times_NK: NDArray[np.float64] | None = None,
) -> float:
    """Standard error of a mean whose values resemble each other within clusters.

    Windows of one document do; the plain error takes each for news of its own.

    Args:
        values_N: As for `mean_with_standard_error`.
        clusters_N: int64 [N], number of each value's cluster.
        times_NK: As for `mean_with_standard_error`.

    Returns:
        The error; that of `mean_with_standard_error` if every value is a cluster of its own, nan
        if there is but one cluster.

    Source:
        Liang and Zeger 1986, with the usual G / (G - 1) for G clusters.
    """
    _, number_N = np.unique(clusters_N, return_inverse=True)
    count = int(number_N.max()) + 1
    if count < 2:
        return math.nan
    sums_G = np.bincount(number_N, weights=_residuals(values_N, times_NK))
    return math.sqrt(float(sums_G @ sums_G) * count / (count - 1)) / len(values_N)


def _residuals(
    values_N: NDArray[np.float64], times_NK: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """What a cubic in t leaves, scaled to the size of the errors that it stands for."""
    count = len(values_N)
    degree = 0 if times_NK is None or count < _LEAST_FOR_A_CUBIC else 3
    powers_NK = np.ones((count, 1)) if times_NK is None else times_NK
    basis_ND = np.stack([(powers_NK**power).mean(axis=1) for power in range(degree + 1)], axis=1)
    coefficients_D, _, rank, _ = np.linalg.lstsq(basis_ND, values_N, rcond=1e-10)
    residual_N = values_N - basis_ND @ coefficients_D
    return np.asarray(residual_N * math.sqrt((count - 1) / (count - int(rank))))


def degrees_of_mean(count: int, *, is_stratified: bool = False) -> int:
    """Degrees of freedom of the error of `mean_with_standard_error`, for intervals.

    Args:
        count: Values, N.
        is_stratified: Whether their times were given.

    Returns:
        N less the coefficients that were fitted; 0 for a single value.
    """
    return count - (4 if is_stratified and count >= _LEAST_FOR_A_CUBIC else 1)


class NoiseBank:
    """A fixed set of mask draws, so that checkpoints and layouts are compared on the same noise.

    Draw k of sample i has t stratified over all N * K draws, spread so that the draws of one
    sample lie apart. Over seeds, every t is uniform: no sample is tied to a noise level.

    Args:
        num_samples: Samples, N.
        draws_per_sample: Draws a sample, K.
        seed: Seed of the bank.

    Attributes:
        times_NK: float64 [N, K], t of every draw, in (0, 1].
    """

    def __init__(self, num_samples: int, draws_per_sample: int, seed: int) -> None:
        self._noise = CounterNoise(seed, VALIDATION_DOMAIN)
        self._draws = draws_per_sample
        total = num_samples * draws_per_sample
        offset = self._noise.uniform(Purpose.VALIDATION, 0)
        times = 1.0 - (offset + van_der_corput_ranks(total) / total) % 1.0
        self.times_NK = times.reshape(num_samples, draws_per_sample)

    def draw(self, sample: int, draw: int) -> BankDraw:
        """One draw of a sample.

        Args:
            sample: Index in 0..N-1.
            draw: Index in 0..K-1.

        Returns:
            The draw.
        """
        return BankDraw(
            self._noise, sample * self._draws + draw, float(self.times_NK[sample, draw])
        )


@dataclass(frozen=True)
class BankDraw:
    """A draw of a bank.

    Attributes:
        noise: Of the bank.
        slot: Number of the draw among all.
        time: Its t, in (0, 1].
    """

    noise: CounterNoise
    slot: int
    time: float

    def uniforms(self, size: int) -> FloatArray:
        """Independent draws from U[0, 1), float64 [size]."""
        return self.noise.uniforms(Purpose.MASK, self.slot, size)

    def maskings(self, lengths: Sequence[int]) -> list[Masking]:
        """Fixed-count masks of several stretches that share a window.

        Args:
            lengths: Tokens of each.

        Returns:
            A mask for each, and its weight.
        """
        times = spread_times(self.time, len(lengths))
        uniforms_S = self.noise.uniforms(Purpose.MASK, self.slot, sum(lengths))
        parts = np.split(uniforms_S, np.cumsum(lengths)[:-1])
        return [fixed_count_masking(part, t) for part, t in zip(parts, times, strict=True)]


def weighted_nll(
    logits_BSV: Tensor, targets_BS: Tensor, weights_BS: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weighted cross-entropy of each sequence.

    Args:
        logits_BSV: float [B, S, V].
        targets_BS: int64 [B, S].
        weights_BS: float [B, S]; positions of weight 0 do not count, whatever their logits.
        dtype: Precision of the softmax.

    Returns:
        [B], in nats times the unit of the weights.
    """
    log_probs_BSV = torch.log_softmax(logits_BSV.to(dtype), dim=-1)
    nll_BS = -log_probs_BSV.gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)
    return torch.where(weights_BS != 0, nll_BS * weights_BS.to(dtype), 0.0).sum(-1)


def estimate_nll(
    denoiser: Denoiser,
    x0_S: NDArray[np.int64],
    *,
    mask_token_id: int,
    num_draws: int,
    seed: int,
    eps: float | None = None,
    batch_size: int = 32,
) -> Estimate:
    """Monte Carlo bound on -log p(x0) of one sequence.

    Args:
        denoiser: From tokens [B, S] to logits [B, S, V].
        x0_S: Clean tokens, int64 [S].
        mask_token_id: Id that hides a token.
        num_draws: Mask draws, with t stratified over them.
        seed: Seed of the draws.
        eps: None for the fixed-count form; otherwise Bernoulli masks with this least probability.
        batch_size: Draws a call of the denoiser.

    Returns:
        Bound in nats for the whole sequence, with its standard error.
    """
    noise = CounterNoise(seed, VALIDATION_DOMAIN)
    offset = noise.uniform(Purpose.VALIDATION, 0)
    times_N = 1.0 - (offset + np.arange(num_draws)) / num_draws
    values: list[float] = []
    for start in range(0, num_draws, batch_size):
        maskings = []
        for draw in range(start, min(start + batch_size, num_draws)):
            uniforms_L = noise.uniforms(Purpose.MASK, draw, len(x0_S))
            t = float(times_N[draw])
            maskings.append(
                fixed_count_masking(uniforms_L, t)
                if eps is None
                else bernoulli_masking(uniforms_L, t, eps)
            )
        mask_BS = torch.from_numpy(np.stack([masking.mask_L for masking in maskings]))
        weight_B1 = torch.tensor([[masking.weight] for masking in maskings], dtype=torch.float64)
        x0_BS = torch.from_numpy(x0_S).expand(len(maskings), -1)
        with torch.no_grad():
            logits_BSV = denoiser(torch.where(mask_BS, mask_token_id, x0_BS))
        values += weighted_nll(logits_BSV, x0_BS, mask_BS * weight_B1, torch.float64).tolist()
    return mean_with_standard_error(np.array(values), times_N[:, None])
