"""The embedding of the noise level, which a model of hybrid or uniform noise may have.

Shapes: S local part of the sequence, B batch, H hidden, F features; N one number for all of a
sequence, or as many as it has tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.interpolation import NUM_TIME_FEATURES
from megatron_mdm.diffusion.time_features import compute_time_features


class TimeEmbedding(torch.nn.Module):
    """A linear map of the features of a log-SNR, which every tensor-parallel rank holds whole.

    Args:
        hidden_size: Width of the residual stream, H.
        sequence_rank: Which part of the sequence this rank sees, and other ranks the rest; None:
            all of it.
    """

    def __init__(self, hidden_size: int, sequence_rank: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, NUM_TIME_FEATURES))
        self._sequence_rank = sequence_rank

    def forward(self, hidden_SBH: Tensor, log_snr_BN: Tensor | None) -> Tensor:
        """Adds the embedding to those of the tokens.

        Args:
            hidden_SBH: float [S, B, H].
            log_snr_BN: float32 [B, N], of the whole sequence.

        Returns:
            The same shape and dtype.

        Raises:
            ConfigError: Nothing gave the log-SNR.
        """
        if log_snr_BN is None:
            raise ConfigError(
                "model.time_embedding=true needs the model input log_snr, which nothing gives: let "
                "Corruption.model_inputs of objective.process hold it, or leave "
                "model.time_embedding out."
            )
        weight_HF, size = self.weight, len(hidden_SBH)
        if self._sequence_rank is not None:
            # Identity forward, summed gradient backward.
            weight_HF = copy_to_tensor_model_parallel_region(weight_HF)
            if log_snr_BN.shape[1] > 1:
                log_snr_BN = log_snr_BN.narrow(1, self._sequence_rank * size, size)
        features_NBF = compute_time_features(log_snr_BN.T)
        return hidden_SBH + F.linear(features_NBF.to(weight_HF.dtype), weight_HF)
