"""Exported models of hybrid and uniform noise: their scores, samples and files."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise
from megatron_mdm.diffusion.noise_sampler import sample_noise
from megatron_mdm.diffusion.probes import make_request_noise
from megatron_mdm.hf.formats.config_fields import Source
from megatron_mdm.hf.formats.exported_config import describe_export
from megatron_mdm.hf.formats.tensor_files import TensorFiles
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import SamplingBatch
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer, make_estimator

MASK = V = 19
NOISES = [HybridNoise(V, 0.2), UniformNoise(V), ShiftedNoise(V, 1.0)]


CASES = [*((noise, False) for noise in NOISES), (NOISES[0], True), (NOISES[1], True)]


@pytest.fixture(params=CASES, ids=["hybrid", "uniform", "shifted", "hybrid time", "uniform time"])
def folder(request, export, tiny):
    noise, time_embedding = request.param
    saved = tiny(time_embedding=time_embedding)._replace(noise=noise)
    return export(saved, type(noise).__name__)[0]


@pytest.fixture
def model(folder):
    return ExportedModel(folder)


def log_probs(model, tokens, log_snr: float | None = None) -> np.ndarray:
    """float64 [S, V] of one sequence alone."""
    told = None if log_snr is None else torch.tensor([log_snr])
    with torch.no_grad():
        logits = model._model(torch.tensor([tokens]), log_snr=told).logits[0, :, :V].double()
    return logits.log_softmax(-1).numpy()


def term(x_hat_V, x0: int, z: int, clean: float, uniform: float) -> float:
    """What the bound takes at a position, by the direct sums."""
    mask = max(1 - clean - V * uniform, 0.0)
    q_V = np.append(clean * np.eye(V)[x0] + uniform, mask)
    q_hat_V = np.append(clean * x_hat_V + uniform, mask)
    seen = q_V > 0
    divergence = float(np.sum(q_V[seen] * np.log(q_V[seen] / q_hat_V[seen])))
    ratio = q_V[z] / q_hat_V[z]
    return divergence + ratio - 1 - float(np.log(ratio))


def test_scores_are_those_of_one_pass_at_a_time(model):
    settings = ScoringSettings(draws=12)
    estimator = make_estimator(model.facts, settings)
    generator = np.random.default_rng(0)
    requests = [
        Request(*(tuple(generator.integers(0, V, size).tolist()) for size in sizes))
        for sizes in ((0, 5), (3, 1), (4, 9))
    ]
    for request, score in zip(requests, Scorer(model, settings).score(requests), strict=True):
        noise = make_request_noise(0, request.context, request.continuation)
        values = []
        for probe in estimator.draw_probes(noise, request.continuation, 0):
            clean = probe.chances[0]
            assert probe.log_snr == pytest.approx(np.log(clean / (1 - clean)), rel=1e-5)
            logs = log_probs(model, [*request.context, *probe.shown_L.tolist()], probe.log_snr)
            values.append(
                -sum(
                    weight * term(np.exp(logs[len(request.context) + place]), x0, z, *probe.chances)
                    for place, (x0, z, weight) in enumerate(
                        zip(request.continuation, probe.shown_L, probe.weights_L, strict=True)
                    )
                )
            )
        by_hand = estimator.combine(len(request.continuation), [np.array(values)])
        assert score.log_likelihood == pytest.approx(by_hand.mean, rel=1e-4)
        assert score.standard_error == pytest.approx(by_hand.standard_error, rel=1e-3)


def test_the_score_of_a_token_is_the_bound_over_all_times(model):
    noise, context, x0 = model.facts.noise, [3, 4], 7

    def list_rows(log_snr: float) -> list[np.ndarray]:
        return [np.exp(log_probs(model, [*context, z], log_snr)[-1]) for z in range(V + 1)]

    known = None if model.facts.takes_log_snr else list_rows(0.0)

    def at_time(t: float) -> float:
        at, total = noise.at(t), 0.0
        rows = known or list_rows(at.log_snr)
        for z in range(V + 1):
            chance = at.mask if z == MASK else at.uniform + at.clean * (z == x0)
            weight = at.mask_weight if z == MASK else at.wrong_weight
            weight = at.right_weight if z == x0 else weight
            if chance:
                total += chance * weight * term(rows[z], x0, z, at.clean, at.uniform)
        return total

    grid = 1 / (1 + np.exp(-np.pi * np.sinh(np.linspace(-1.7, 1.7, 201))))
    steps = np.pi * np.cosh(np.linspace(-1.7, 1.7, 201)) * grid * (1 - grid) * 3.4 / 200
    exact = sum(at_time(float(t)) * step for t, step in zip(grid, steps, strict=True))
    (score,) = Scorer(model, ScoringSettings(draws=3000)).score([Request(tuple(context), (x0,))])
    assert abs(-score.log_likelihood - exact) < 4 * score.standard_error + 1e-3 * exact
    assert score.standard_error < 0.1 * exact


def test_samples_are_those_of_the_sampler(model):
    tokens_BS = torch.tensor([[3, MASK, MASK, 5, MASK], [MASK, MASK, 1, 2, 3]])
    decoding = Decoding(num_steps=3, correction_steps=4).resolve_noise(has_masks=False)
    batch = SamplingBatch(tokens_BS, tokens_BS >= 0, None, [7, 8], decoding)
    found_BS = model.complete(batch)

    class Denoiser:
        def logits_at(self, x_BS, needed_BS, window):
            return model._model(x_BS, log_snr=window.log_snr_B).logits[needed_BS]

    expected_BS = sample_noise(
        Denoiser(),
        tokens_BS,
        model.facts.noise,
        decoding,
        mask_token_id=MASK,
        vocab_size=V,
        seeds=[7, 8],
        tells_log_snr=model.facts.takes_log_snr,
    )
    assert found_BS.tolist() == expected_BS.tolist()
    assert (found_BS < V).all()
    assert (found_BS[tokens_BS != MASK] == tokens_BS[tokens_BS != MASK]).all()


def test_the_export_says_its_noise_and_is_read_back(folder, model):
    described = json.loads((folder / "config.json").read_text())["noise"]
    assert described["num_tokens"] == V
    saved = describe_export(Source("export", folder, TensorFiles(folder))).saved
    assert saved.noise == model.facts.noise
    assert saved.model.time_embedding == model.facts.takes_log_snr
    assert saved.to_tree()["objective"]["process"]["kind"] in ("hybrid", "uniform")
    assert "| noise | " in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "options", [{"estimator": "chain_rule"}, {"greedy_match": "confidence"}, {"guidance_scale": 1}]
)
def test_what_hides_tokens_is_refused_for_uniform_noise(options, export, tiny):
    model = ExportedModel(export(tiny()._replace(noise=UniformNoise(V)), "uniform")[0])
    with pytest.raises(ConfigError, match="has never seen: leave it out"):
        Scorer(model, ScoringSettings(**options))


def test_the_chain_rule_reads_a_hybrid_model_behind_masks(export, tiny):
    model = ExportedModel(export(tiny()._replace(noise=NOISES[0]), "hybrid")[0])
    request = Request((1, 2), (3, 4, 5))
    (score,) = Scorer(model, ScoringSettings("chain_rule")).score([request])
    shown = [[1, 2, MASK, MASK, MASK], [1, 2, 3, MASK, MASK], [1, 2, 3, 4, MASK]]
    expected = sum(
        log_probs(model, tokens)[place, token]
        for tokens, place, token in zip(shown, itertools.count(2), (3, 4, 5), strict=False)
    )
    assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert score.standard_error == 0


def test_the_bound_of_noise_is_refused_where_there_is_none(export, tiny):
    with pytest.raises(ConfigError, match="is the bound of hybrid or uniform noise"):
        Scorer(ExportedModel(export(tiny())[0]), ScoringSettings("process"))


def test_guided_scores_are_those_of_one_pass_at_a_time_at_its_noise_level(export, tiny):
    saved = tiny(time_embedding=True)._replace(noise=NOISES[0])
    model = ExportedModel(export(saved, "time")[0])
    request, scale = Request((3, 4), (5, 6, 7)), 0.5
    settings = ScoringSettings(draws=6, guidance_scale=scale)
    (score,) = Scorer(model, settings).score([request])
    noise = make_request_noise(0, request.context, request.continuation)
    values = []
    for probe in make_estimator(model.facts, settings).draw_probes(noise, (5, 6, 7), 0):
        shown = probe.shown_L.tolist()
        seen, hidden = (
            log_probs(model, [*context, *shown], probe.log_snr)[2:]
            for context in ([3, 4], [MASK, MASK])
        )
        logs = torch.tensor(hidden + (scale + 1) * (seen - hidden)).log_softmax(-1).numpy()
        terms = [
            weight * term(np.exp(row_V), x0, z, *probe.chances)
            for row_V, x0, z, weight in zip(logs, (5, 6, 7), shown, probe.weights_L, strict=True)
        ]
        values.append(-sum(terms))
    assert score.log_likelihood == pytest.approx(float(np.mean(values)), rel=1e-4)


@pytest.mark.parametrize("options", [{"estimator": "fixed_count"}, {"greedy_match": "confidence"}])
def test_what_hides_tokens_is_refused_for_models_that_are_told_the_noise(options, export, tiny):
    saved = tiny(time_embedding=True)._replace(noise=NOISES[0])
    model = ExportedModel(export(saved, "time")[0])
    with pytest.raises(ConfigError, match="without a level of noise, which"):
        Scorer(model, ScoringSettings(**options))


@pytest.mark.parametrize("log_snr", [None, torch.tensor([0.5]), torch.tensor(0.5)])
def test_a_pass_without_a_log_snr_of_each_sequence_is_refused(log_snr, export, tiny):
    model = ExportedModel(export(tiny(time_embedding=True)._replace(noise=NOISES[0]), "time")[0])
    with pytest.raises(ValueError, match="pass log_snr, a tensor with the log-SNR of each of the"):
        model._model(torch.zeros(2, 3, dtype=torch.int64), log_snr=log_snr)


def test_an_ensemble_tells_the_noise_to_those_of_its_members_that_take_it(export, tiny):
    folders = [
        export(tiny(time_embedding=told)._replace(noise=NOISES[0]), name, seed=seed)[0]
        for seed, (name, told) in enumerate((("time", True), ("plain", False)))
    ]
    members = [ExportedModel(folder) for folder in folders]
    request = Request((3,), (5, 6))
    settings = ScoringSettings(draws=6)
    (score,) = Scorer(Ensemble(members), settings).score([request])
    noise = make_request_noise(0, request.context, request.continuation)
    values = []
    for probe in make_estimator(members[0].facts, settings).draw_probes(noise, (5, 6), 0):
        shown = probe.shown_L.tolist()
        told = np.exp(log_probs(members[0], [3, *shown], probe.log_snr)[1:])
        mean = (told + np.exp(log_probs(members[1], [3, *shown])[1:])) / 2
        terms = [
            weight * term(row_V, x0, z, *probe.chances)
            for row_V, x0, z, weight in zip(mean, (5, 6), shown, probe.weights_L, strict=True)
        ]
        values.append(-sum(terms))
    assert score.log_likelihood == pytest.approx(float(np.mean(values)), rel=1e-4)
