"""Likelihoods one request at a time, as the papers' public code computes them.

Of masked diffusion it runs a request's masks 32 at a time, of the chain rule a row for each token,
with the logits of all positions; nothing is padded. Of an autoregressive model it runs the harness'
own loop at batch size 1: all tokens but the last, and the log-softmax of all positions.

Shapes: B draws, S sequence, V vocabulary, M masked positions of all draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.diffusion.probes import LikelihoodEstimator, make_request_noise
from megatron_mdm.inference.requests import Request, ScoringSettings

# Draws of one forward pass of the public code.
_PUBLIC_BATCH = 32


def one_at_a_time(
    model: Any, settings: ScoringSettings, requests: Sequence[Request]
) -> list[float]:
    """Log-likelihoods by masked diffusion.

    Args:
        model: Of an export.
        settings: Estimator, draws, guidance and seed.
        requests: What is scored.

    Returns:
        The estimate of each request, in nats.
    """
    return [_public(model, request, settings) for request in requests]


def one_at_a_time_causal(model: Any, requests: Sequence[Request]) -> list[float]:
    """Log-likelihoods of an autoregressive model.

    Args:
        model: Of an export.
        requests: What is scored.

    Returns:
        The log-likelihood of each request, in nats.
    """
    return [_public_causal(model, request) for request in requests]


@torch.inference_mode()
def _public(model: Any, request: Request, settings: ScoringSettings) -> float:
    """Draws of one request in batches of 32, logits of all positions, as in the public code.

    Source:
        The procedure of the published evaluation code of arXiv 2410.18514, on our masks: with
        guidance, both passes in one batch and their logits combined.
    """
    estimator = LikelihoodEstimator(settings.estimator, settings.draws, settings.stratified)
    size = len(request.continuation)
    noise = make_request_noise(settings.seed, request.context, request.continuation)
    probes = estimator.draw_probes(noise, size, 0)
    clean_S = torch.tensor([*request.context, *request.continuation])
    found: list[float] = []
    # One target a pass in the left-to-right estimator: a row each, as many at once.
    for start in range(0, len(probes), _PUBLIC_BATCH):
        part = probes[start : start + _PUBLIC_BATCH]
        hidden_BS = torch.zeros(len(part), len(clean_S), dtype=torch.bool)
        weights_BS = torch.zeros(len(part), len(clean_S), dtype=torch.float64)
        hidden_BS[:, -size:] = torch.from_numpy(np.stack([probe.hidden_L for probe in part]))
        weights_BS[:, -size:] = torch.from_numpy(np.stack([probe.weights_L for probe in part]))
        tokens_BS = torch.where(hidden_BS, model.config.mask_token_id, clean_S)
        logits_BSV = _public_logits(model, tokens_BS, len(request.context), settings)
        targets_BS = clean_S.expand_as(tokens_BS)
        loss_M = F.cross_entropy(logits_BSV[hidden_BS], targets_BS[hidden_BS], reduction="none")
        values_BS = torch.zeros(len(part), len(clean_S), dtype=torch.float64)
        values_BS[hidden_BS] = -loss_M.double()
        found += (values_BS * weights_BS).sum(1).tolist()
    return estimator.combine(size, [np.array(found)]).mean


def _public_logits(model: Any, tokens_BS: Tensor, size: int, settings: ScoringSettings) -> Tensor:
    scale = settings.guidance_scale
    if scale == 0:
        logits_BSV: Tensor = model(tokens_BS).logits
        return logits_BSV
    others_BS = tokens_BS.clone()
    others_BS[:, :size] = model.config.mask_token_id
    both_BSV, others_BSV = model(torch.cat([tokens_BS, others_BS])).logits.chunk(2)
    guided_BSV: Tensor = others_BSV + (scale + 1) * (both_BSV - others_BSV)
    return guided_BSV


@torch.inference_mode()
def _public_causal(model: Any, request: Request) -> float:
    # As the harness' own models do: the last token predicts nothing, and is not run.
    tokens_S = torch.tensor([*request.context, *request.continuation])
    log_probs_SV = model(tokens_S[None, :-1]).logits[0].log_softmax(-1)
    start = len(request.context)
    found = log_probs_SV[start - 1 :].gather(1, tokens_S[start:, None])
    return float(found.double().sum())
