"""A log-SNR as the numbers that a model embeds: a Fourier series. Pure torch.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .interpolation import NUM_TIME_FEATURES

# Log-SNRs of uniform noise at times in (1e-4, 1 - 1e-4) are within 9.3.
_GREATEST_LOG_SNR = 10.0


def compute_time_features(log_snr: Tensor) -> Tensor:
    """Computes cos(pi k l / 20) for k = 1..32, and then the sines, of log-SNRs l.

    Within -10 and 10 no two log-SNRs have the same; others count as the nearer of these.

    Args:
        log_snr: float, any shape [...].

    Returns:
        float32 [..., 64].
    """
    reach = _GREATEST_LOG_SNR
    orders_K = torch.arange(1, NUM_TIME_FEATURES // 2 + 1, device=log_snr.device)
    angles = log_snr.float().clamp(-reach, reach)[..., None] * (orders_K * (math.pi / (2 * reach)))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
