"""Estimators of the negative log-likelihood, with standard errors, over any denoiser.

A denoiser is a function from tokens int64 [B, S] to logits float [B, S, V]. The mask token takes
part in no softmax: a denoiser that has a logit for it must return -inf there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.core.statistics import Estimate, mean_with_standard_error
from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.noise import CounterNoise, FloatArray, Purpose, van_der_corput_ranks

Denoiser = Callable[[Tensor], Tensor]

# Keeps the bank's draws apart from a training run's with the same seed.
VALIDATION_DOMAIN = 1


class NoiseBank:
    """A fixed set of mask draws, so that checkpoints and layouts are compared on the same noise.

    Draw k of sample i has t stratified over all N * K draws, spread so that the draws of one
    sample lie apart. Over seeds, every t is uniform: no sample is tied to a noise level.

    Args:
        num_samples: Samples, N.
        draws_per_sample: Draws per sample, K.
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
        batch_size: Draws per call of the denoiser.

    Returns:
        Bound in nats for the whole sequence, with its standard error.
    """
    noise = CounterNoise(seed, VALIDATION_DOMAIN)
    offset = noise.uniform(Purpose.VALIDATION, 0)
    times_N = 1.0 - (offset + np.arange(num_draws)) / num_draws
    process = AbsorbingProcess(mask_token_id, fixed_count=eps is None, eps=eps or 0.0)
    values: list[float] = []
    for start in range(0, num_draws, batch_size):
        corruptions = [
            process.corrupt(
                x0_S, float(times_N[draw]), noise.uniforms(Purpose.MASK, draw, len(x0_S))
            )
            for draw in range(start, min(start + batch_size, num_draws))
        ]
        xt_BS = torch.from_numpy(np.stack([one.xt_L for one in corruptions]))
        weights_BS = torch.from_numpy(np.stack([one.weights_L for one in corruptions]))
        with torch.no_grad():
            logits_BSV = denoiser(xt_BS)
        x0_BS = torch.from_numpy(x0_S).expand_as(xt_BS)
        values += weighted_nll(logits_BSV, x0_BS, weights_BS, torch.float64).tolist()
    return mean_with_standard_error(np.array(values), times_N[:, None])
