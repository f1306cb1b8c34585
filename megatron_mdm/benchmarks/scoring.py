"""Likelihoods of many requests, beside one request at a time as the papers' public code does it.

Shapes: B draws, S sequence, V vocabulary, M masked positions of all draws.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from megatron_mdm.benchmarks.harness import check_at_least, summarize
from megatron_mdm.benchmarks.sampling import load_export, random_export
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.probes import LikelihoodEstimator, request_noise
from megatron_mdm.evaluation.requests import ScoringRequest, ScoringSettings
from megatron_mdm.evaluation.scoring import Scorer
from megatron_mdm.evaluation.scoring_model import Judgement, ScoringBatch, judge_with
from megatron_mdm.generation.text_model import ModelFacts
from megatron_mdm.parallel.host_memory import keep_freed_memory

# Draws of one forward pass of the public code.
_PUBLIC_BATCH = 32


class ScoreSettings(NamedTuple):
    """What is scored.

    Attributes:
        num_requests: Requests.
        context_tokens: Tokens of a context on average; from half to one and a half times.
        continuation_tokens: Tokens of a continuation on average, from 1 on.
        draws: Random masks a request.
        repeats: Runs of each case, in turn.
    """

    num_requests: int = 64
    context_tokens: int = 48
    continuation_tokens: int = 8
    draws: int = 128
    repeats: int = 3


class _Model:
    """The model of an export without a tokenizer."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer = model, None
        config = model.config
        self.facts = ModelFacts(
            name="the model",
            is_causal=config.is_causal,
            vocab_size=config.vocab_size,
            mask_token_id=config.mask_token_id,
            max_length=config.max_position_embeddings,
            end_token_id=None,
            stops_at_end=False,
            aligns_prompts=True,
            has_cache=True,
            decoding=Decoding(),
        )

    def judge(self, batch: ScoringBatch) -> Judgement:
        return judge_with(self.model, batch)


class _Run(NamedTuple):
    seconds: float
    values: list[float]


def measure_scoring(folder: Path | None, settings: ScoreSettings) -> dict[str, Any]:
    """Times scoring in turn on one model.

    Args:
        folder: An exported model; None: the demo's sizes with random weights, of both objectives.
        settings: What is scored.

    Returns:
        Of each case requests a second and the most that two ways differ, in nats; how many times
        faster ours is than the same estimator one request at a time; and how many times the draws
        of `fixed_count` other forms need for the same error, on continuations too long for all
        masks.

    Raises:
        ConfigError: A setting is out of range, or the model cannot be used.
    """
    for name, value in settings._asdict().items():
        check_at_least("--" + name.replace("_", "-"), value, 2 if name == "draws" else 1)
    keep_freed_memory()
    length = 3 * settings.context_tokens // 2 + 2 * settings.continuation_tokens
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        if folder is not None:
            models = [load_export(folder)]
        else:
            models = [
                load_export(random_export(Path(scratch) / name, length, is_causal=name == "ar"))
                for name in ("mdm", "ar")
            ]
        for model in models:
            results |= _measure(_Model(model), settings)
    return results


def _measure(model: _Model, settings: ScoreSettings) -> dict[str, Any]:
    requests = _requests(settings, model.facts)
    cases: dict[str, tuple[Callable[[], list[float]], Callable[[], list[float]]]] = {}
    if model.facts.is_causal:
        cases["autoregressive"] = (
            lambda: _ours(model, requests, ScoringSettings()),
            lambda: [_public_causal(model.model, request) for request in requests],
        )
    else:
        for kind in ("fixed_count", "monte_carlo", "chain_rule"):
            chosen = ScoringSettings(kind, draws=settings.draws)
            cases[kind] = (
                partial(_ours, model, requests, chosen),
                partial(_one_at_a_time, model, requests, chosen),
            )
    found = {name: _compare(*pair, settings) for name, pair in cases.items()}
    if not model.facts.is_causal:
        found["draws_for_the_same_error"] = _compare_errors(model, requests, settings)
    return found


def _compare(
    ours: Callable[[], list[float]], public: Callable[[], list[float]], settings: ScoreSettings
) -> dict[str, Any]:
    runs: dict[str, list[_Run]] = {"ours": [], "public": []}
    for case in (ours, public):
        case()  # the first run of a case pays for memory and kernels
    for _ in range(settings.repeats):
        for name, case in (("ours", ours), ("public", public)):
            start = time.perf_counter()
            values = case()
            runs[name].append(_Run(time.perf_counter() - start, values))
    pairs = list(zip(runs["ours"], runs["public"], strict=True))
    found: dict[str, Any] = {
        f"{name}_requests_per_second": summarize(
            [settings.num_requests / run.seconds for run in done]
        )
        for name, done in runs.items()
    }
    found["ours_over_public"] = summarize([b.seconds / a.seconds for a, b in pairs])
    found["most_different_nats"] = max(
        float(np.abs(np.subtract(a.values, b.values)).max()) for a, b in pairs
    )
    return found


def _compare_errors(
    model: _Model, requests: Sequence[ScoringRequest], settings: ScoreSettings
) -> dict[str, Any]:
    """How many draws each form needs, as a multiple of `fixed_count` with stratified t."""
    drawn = [one for one in requests if 2 ** len(one.continuation) - 1 > settings.draws]
    if not drawn:
        return {"num_requests": 0}
    forms = {
        "fixed_count": ScoringSettings("fixed_count", settings.draws),
        "fixed_count_independent_t": ScoringSettings("fixed_count", settings.draws, False),
        "monte_carlo": ScoringSettings("monte_carlo", settings.draws),
        "monte_carlo_independent_t": ScoringSettings("monte_carlo", settings.draws, False),
    }
    # The error falls with the root of the draws.
    variances = {
        name: float(np.mean([one.standard_error**2 for one in Scorer(model, form).score(drawn)]))
        for name, form in forms.items()
    }
    base = variances["fixed_count"]
    return {"num_requests": len(drawn)} | {name: one / base for name, one in variances.items()}


def _requests(settings: ScoreSettings, facts: ModelFacts) -> list[ScoringRequest]:
    generator = np.random.default_rng(0)
    half, most = settings.context_tokens // 2, 2 * settings.continuation_tokens
    return [
        ScoringRequest(
            tuple(generator.integers(0, facts.vocab_size, half + index % (2 * half + 1)).tolist()),
            tuple(generator.integers(0, facts.vocab_size, 1 + index % (most - 1)).tolist()),
        )
        for index in range(settings.num_requests)
    ]


def _ours(
    model: _Model, requests: Sequence[ScoringRequest], settings: ScoringSettings
) -> list[float]:
    return [score.log_likelihood for score in Scorer(model, settings).score(requests)]


def _one_at_a_time(
    model: _Model, requests: Sequence[ScoringRequest], settings: ScoringSettings
) -> list[float]:
    return [_public(model.model, request, settings) for request in requests]


@torch.inference_mode()
def _public(model: Any, request: ScoringRequest, settings: ScoringSettings) -> float:
    """Draws of one request in batches of 32, logits of all positions, as in the public code.

    Source:
        The procedure of the published evaluation code of arXiv 2410.18514, on our masks.
    """
    estimator = LikelihoodEstimator(settings.estimator, settings.draws, settings.stratified)
    size = len(request.continuation)
    noise = request_noise(settings.seed, *request)
    probes = estimator.probes(noise, size, 0)
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
        logits_BSV = model(tokens_BS).logits
        targets_BS = clean_S.expand_as(tokens_BS)
        loss_M = F.cross_entropy(logits_BSV[hidden_BS], targets_BS[hidden_BS], reduction="none")
        values_BS = torch.zeros(len(part), len(clean_S), dtype=torch.float64)
        values_BS[hidden_BS] = -loss_M.double()
        found += (values_BS * weights_BS).sum(1).tolist()
    return estimator.combine(size, [np.array(found)]).mean


@torch.inference_mode()
def _public_causal(model: Any, request: ScoringRequest) -> float:
    tokens_1S = torch.tensor([[*request.context, *request.continuation]])
    log_probs_SV = model(tokens_1S).logits[0].log_softmax(-1)
    start = len(request.context)
    found = log_probs_SV[start - 1 : -1].gather(1, tokens_1S[0, start:, None])
    return float(found.double().sum())
