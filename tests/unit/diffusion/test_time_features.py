"""What models of hybrid and uniform noise are told of it: log-SNRs and their features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mdm.config import Config, parse_config
from megatron_mdm.config.objective import RunFacts
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.interpolating import HybridConfig, UniformConfig
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import LOG_SNR, PromptResponseSpan, TextWindow
from megatron_mdm.diffusion.time_features import compute_time_features

N, S = 11, 12
BANK = NoiseBank(4, 1, seed=0)
FACTS = RunFacts(seed=0, global_batch_size=4, mask_token_id=N, vocab_size=N, time_embedding=True)
PROCESSES = [HybridConfig(p_u=0.2), HybridConfig(shift=1.0), UniformConfig()]
WINDOW = TextWindow(np.arange(S) % N)
PAIRS = TextWindow(
    np.arange(S) % N,
    pairs=(PromptResponseSpan(0, 2, 4, 5), PromptResponseSpan(5, 7, 10, 10)),
    pairs_per_window=2.0,
)


def config_of(*, learns_responses=False, time_embedding=True, **objective) -> Config:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    return parse_config(
        {
            "run": {"dir": "r"},
            "model": {**sizes, "vocab_size": N, "time_embedding": time_embedding},
            "objective": {"kind": "mdm", **objective},
            "finetuning": {"enabled": learns_responses},
            "data": {"train": [{"path": "a"}], "seq_length": S},
            "batch": {"global_batch_size": 4},
            "schedule": {"steps": 4},
        }
    )


def log_snr_of(clean: float) -> float:
    return float(np.log(clean / (1 - clean)))


def test_features_are_a_fourier_series_of_the_log_snr():
    values = np.linspace(-10, 10, 41)
    angles = np.pi * np.outer(values, np.arange(1, 33)) / 20
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = compute_time_features(torch.tensor(values))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # No two log-SNRs have the same, and those beyond count as the nearest within.
    assert np.linalg.matrix_rank(expected) == 41
    beyond = compute_time_features(torch.tensor([-1e3, 12.0]))
    torch.testing.assert_close(beyond, found[[0, -1]])


@pytest.mark.parametrize(
    "noise", [HybridNoise(N, 0.3), HybridNoise(N, 0.0), ShiftedNoise(N, 1.0), UniformNoise(N)]
)
def test_log_snrs_of_all_times_are_within_reach(noise):
    for t in np.linspace(1e-4, 1 - 1e-4, 1001):
        at = noise.at(float(t))
        assert at.log_snr == pytest.approx(log_snr_of(at.clean), rel=1e-9)
        assert abs(at.log_snr) < 10


@pytest.mark.parametrize("section", PROCESSES, ids=lambda one: one.kind)
def test_a_process_tells_the_log_snr_of_the_time_that_it_corrupts_at(section):
    process, uniforms_L = section.build(FACTS), np.full(S, 0.5)
    for t in (0.01, 0.4, 1.0):
        for found, time in (
            (process.corrupt(WINDOW.tokens_S, t, uniforms_L), 1e-4 + (1 - 2e-4) * t),
            (process.corrupt_held_out(WINDOW.tokens_S, t, uniforms_L), 1e-4 + (1 - 2e-4) * t**3),
        ):
            told = found.model_inputs[LOG_SNR]
            assert (told.dtype, told.shape) == (np.float32, (1,))
            assert told[0] == pytest.approx(log_snr_of(process.noise.at(time).clean), rel=1e-6)
            assert found.loss_inputs["clean_chance"][0] == pytest.approx(process.noise.at(time)[0])
    quiet = section.build(FACTS._replace(time_embedding=False))
    assert not quiet.corrupt(WINDOW.tokens_S, 0.5, uniforms_L).model_inputs


@pytest.mark.parametrize("fields", [{}, {"stochastic_length_ratio": 1.0}])
def test_samples_and_batches_carry_it(fields):
    objective = build_objective(config_of(process={"kind": "uniform"}, **fields))
    samples = [objective.sample(WINDOW, position) for position in range(4)]
    samples.append(objective.held_out_sample(WINDOW, "nll", BANK.draw(2, 0)))
    told_B1 = Batch.stack(samples).model_inputs[LOG_SNR]
    assert told_B1.shape == (5, 1)
    clean_B = [sample.loss_inputs["clean_chance"][0] for sample in samples]
    np.testing.assert_allclose(told_B1[:, 0], [log_snr_of(a) for a in clean_B], rtol=1e-3)


def test_a_window_of_which_nothing_is_predicted_tells_it_too():
    objective = build_objective(config_of(process={"kind": "hybrid"}))
    window = WINDOW._replace(segment_ids_S=np.arange(S, dtype=np.int32))
    sample = objective.held_out_sample(window, "nll_given_first", BANK.draw(1, 0))
    assert sample.weights_S.sum() == 0
    assert sample.inputs_S.tolist() == window.tokens_S.tolist()
    assert sample.model_inputs[LOG_SNR].shape == (1,)


def test_each_pair_of_a_window_has_its_own():
    config = config_of(process={"kind": "hybrid"}, learns_responses=True)
    objective = build_objective(config)
    for sample in (
        objective.sample(PAIRS, 3),
        objective.held_out_sample(PAIRS, "nll", BANK.draw(1, 0)),
    ):
        told_S = sample.model_inputs[LOG_SNR]
        clean = [sample.loss_inputs["clean_chance"][pair.response] for pair in PAIRS.pairs]
        one, other = (log_snr_of(a) for a in clean)
        assert one != pytest.approx(other, rel=0.1)
        expected_S = np.repeat([one, other, 0.0], [5, 5, 2])
        np.testing.assert_allclose(told_S, expected_S, rtol=1e-3)


def test_masks_alone_tell_nothing():
    sample = build_objective(config_of(time_embedding=False)).sample(WINDOW, 0)
    assert not sample.model_inputs


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"kind": "ar"},
        {"kind": "mixture"},
        {"process": {"kind": "hybrid", "p_u": 0}},
        {"process": {"kind": "hybrid", "shift": -1000}},
    ],
)
def test_an_embedding_of_the_noise_is_refused_where_it_is_masks_alone(objective):
    with pytest.raises(ConfigError, match="best predictor does not depend on that"):
        config_of(**objective)
    config_of(time_embedding=False, **objective)
