"""Processes between masked and uniform diffusion: what they draw, weigh, and undo."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from bound_reference import JOINT, MASK, N, exact_x_hat, full_q
from pydantic import ValidationError

from megatron_mdm.config.objective import RunFacts
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.interpolating import (
    CLEAN,
    UNIFORM,
    HybridConfig,
    InterpolatingProcess,
    UniformConfig,
)
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise
from megatron_mdm.diffusion.masked_diffusion import MaskedDiffusionConfig
from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.reverse_process import sample_reverse

NOISES = [HybridNoise(N, 0.2), HybridNoise(N, 0.2, 2.0), UniformNoise(N), ShiftedNoise(N, 0.0)]
GRID = (np.arange(20_000) + 0.5) / 20_000


def process_of(noise, **options) -> InterpolatingProcess:
    return InterpolatingProcess(noise, N, MASK, **options)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_tokens_are_corrupted_with_the_stated_chances(noise, t):
    process = process_of(noise, eps=1e-9)
    for x0 in range(N):
        xt = process.corrupt(np.full(len(GRID), x0), t, GRID).xt_L
        shares = np.bincount(xt, minlength=N + 1) / len(GRID)
        np.testing.assert_allclose(shares, full_q(noise, t)[x0], atol=2e-4)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_weights_and_chances_are_those_of_the_time(noise):
    x0, t = np.arange(N).repeat(200), 0.4
    drawn = process_of(noise).corrupt(x0, t, np.random.default_rng(0).random(len(x0)))
    at = noise.at(1e-4 + (1 - 2e-4) * t)
    expected = np.where(drawn.xt_L == x0, at.right_weight, at.wrong_weight)
    expected = np.where(drawn.xt_L == MASK, at.mask_weight, expected)
    np.testing.assert_allclose(drawn.weights_L, expected)
    assert set(drawn.loss_inputs) == {CLEAN, UNIFORM}
    assert (drawn.loss_inputs[CLEAN] == at.clean).all()
    assert (drawn.loss_inputs[UNIFORM] == at.uniform).all()


@pytest.mark.parametrize("t", [0.03, 0.5, 0.9])
def test_dynamic_weights_are_the_published_ones(t):
    # arXiv 2503.04482: 2 on masks, 1 on wrong tokens, b / (a + b) on right ones.
    process = process_of(HybridNoise(N, 0.2), weighting="dynamic", eps=1e-9)
    drawn = process.corrupt(np.zeros(len(GRID), np.int64), t, GRID)
    at = process.noise.at(1e-9 + (1 - 2e-9) * t)
    for z, weight in ((MASK, 2.0), (1, 1.0), (0, at.uniform / (at.clean + at.uniform))):
        assert drawn.weights_L[drawn.xt_L == z][0] == pytest.approx(weight)


def test_other_weightings_change_training_alone():
    x0, uniforms = np.arange(N).repeat(50), np.random.default_rng(1).random(3 * 50)
    true_L = process_of(NOISES[0], weighting="bound").corrupt(x0, 0.05, uniforms).weights_L
    time = 1e-4 + (1 - 2e-4) * 0.05
    for weighting, expected_L in {
        "log_snr": true_L * time * (1 - time),
        "clip": np.minimum(true_L, 3.0),
        "equal": np.ones_like(true_L),
    }.items():
        process = process_of(NOISES[0], weighting=weighting, max_weight=3.0)
        np.testing.assert_allclose(process.corrupt(x0, 0.05, uniforms).weights_L, expected_L)
        u = 0.05 ** (1 / 3)
        held_out_L = process.corrupt_held_out(x0, u, uniforms).weights_L
        np.testing.assert_allclose(held_out_L, 3 * u**2 * true_L)


def test_the_mask_token_may_stand_inside_the_vocabulary():
    process = InterpolatingProcess(HybridNoise(3, 0.3), 3, 1)
    xt = process.corrupt(np.full(len(GRID), 2), 0.8, GRID).xt_L
    at = process.noise.at(1e-4 + (1 - 2e-4) * 0.8)
    shares = np.bincount(xt, minlength=4) / len(GRID)
    expected = [at.uniform, at.mask, at.clean + at.uniform, at.uniform]
    np.testing.assert_allclose(shares, expected, atol=2e-4)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize(("t", "s"), [(0.8, 0.3), (0.5, 0.0)])
def test_a_step_back_is_the_stated_transition(noise, t, s):
    process, x_hat_V = process_of(noise), np.array([0.5, 0.3, 0.2])
    q_t = full_q(noise, t)
    q_s = full_q(noise, s) if s else np.hstack([np.eye(N), np.zeros((N, 1))])
    a_t, a_s = noise.at(t).clean, noise.at(s).clean if s else 1.0
    noise_t_V = q_t[0] - a_t * np.eye(N + 1)[0]
    noise_s_V = q_s[0] - a_s * np.eye(N + 1)[0]
    for z in range(N + 1):
        if q_t[0, z] == 0 and z == MASK:
            continue
        between_V = a_t / a_s * np.eye(N + 1)[z] + noise_t_V[z] - a_t / a_s * noise_s_V[z]
        expected_V = between_V * (x_hat_V @ q_s) / (x_hat_V @ q_t)[z]
        assert expected_V.sum() == pytest.approx(1)
        draws = np.random.default_rng(0).random(2 * len(GRID))
        draws[: len(GRID)] = GRID
        x_hat_LV = np.tile(x_hat_V, (len(GRID), 1))
        found = process.step_back(np.full(len(GRID), z), x_hat_LV, t, s, draws)
        shares_V = np.bincount(found, minlength=N + 1) / len(GRID)
        np.testing.assert_allclose(shares_V, expected_V, atol=0.012)


def law_after(noise, num_steps: int, predictor) -> np.ndarray:
    """The law of one token after so many steps back, exactly: a product of transitions."""
    law_Z = full_q(noise, 1 - 1e-9)[0]
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        q_t = full_q(noise, min(t, 1 - 1e-9))
        q_s = full_q(noise, s) if s else np.hstack([np.eye(N), np.zeros((N, 1))])
        a_t, a_s = (q[0, 0] - q[1, 0] for q in (q_t, q_s))
        noise_t_V, noise_s_V = q_t[0] - a_t * np.eye(N + 1)[0], q_s[0] - a_s * np.eye(N + 1)[0]
        after_Z = np.zeros(N + 1)
        for z in np.flatnonzero(law_Z):
            x_hat_V = predictor(q_t, z)
            between_V = a_t / a_s * np.eye(N + 1)[z] + noise_t_V[z] - a_t / a_s * noise_s_V[z]
            after_Z += law_Z[z] * between_V * (x_hat_V @ q_s) / (x_hat_V @ q_t)[z]
        law_Z = after_Z
    return law_Z[:N]


P = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_one_token_is_drawn_from_its_law_after_any_number_of_steps(noise, num_steps):
    np.testing.assert_allclose(law_after(noise, num_steps, lambda q, z: P), P, atol=1e-7)
    process = process_of(noise)
    found = [
        sample_reverse(
            process,
            lambda x_L: P[None].repeat(400, 0),
            CounterNoise(seed),
            length=400,
            num_steps=num_steps,
        )
        for seed in range(10)
    ]
    shares_V = np.bincount(np.concatenate(found), minlength=N) / 4000
    np.testing.assert_allclose(shares_V, P, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (UniformNoise(N), [0.441472, 0.314325, 0.244203]),
        (HybridNoise(N, 0.2), [0.464863, 0.307578, 0.227559]),
    ],
    ids=["uniform", "p_u=.2"],
)
def test_what_plain_cross_entropy_learns_gives_the_stated_wrong_law(noise, expected):
    def posterior(q, z):
        return P * q[:, z] / (P @ q[:, z])

    np.testing.assert_allclose(law_after(noise, 3, posterior), expected, atol=2e-6)


@pytest.mark.parametrize("noise", [NOISES[0], NOISES[2]], ids=repr)
def test_samples_of_two_tokens_follow_the_joint(noise):
    process, num_steps, size = process_of(noise), 40, 20_000
    rng = np.random.default_rng(0)
    x_L = process.draw_prior(rng.random(2 * size))
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        table = {
            (z, place): exact_x_hat(noise, min(t, 1 - 1e-4), z, place)
            for z in itertools.product(range(N + 1), repeat=2)
            if MASK not in z or noise.at(0.5).mask
            for place in (0, 1)
        }
        pairs = [tuple(pair) for pair in x_L.reshape(-1, 2).tolist()]
        x_hat_LV = np.array([table[pair, place] for pair in pairs for place in (0, 1)])
        x_L = process.step_back(x_L, x_hat_LV, t, s, rng.random(4 * size))
    found = np.bincount(x_L.reshape(-1, 2) @ [N, 1], minlength=N * N).reshape(N, N) / size
    # Places of one step are drawn independently, which costs less the shorter the steps are.
    np.testing.assert_allclose(found, JOINT, atol=0.012)


FACTS = RunFacts(seed=0, global_batch_size=4, mask_token_id=11, vocab_size=11)


def test_sections_build_their_processes():
    assert HybridConfig(p_u=0.2, gamma=2.0).build(FACTS).noise == HybridNoise(11, 0.2, 2.0)
    assert HybridConfig(shift=-2).build(FACTS).noise == ShiftedNoise(11, -2)
    inside = FACTS._replace(mask_token_id=3)
    assert UniformConfig().build(inside).noise == UniformNoise(10)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "hybrid", "p_u": 1}, "p_u=1.0 leaves no token to be masked: use less than 1, or"),
        ({"kind": "hybrid", "gamma": 2.1}, "gamma=2.1 would need tokens that jump at negative"),
        ({"kind": "hybrid", "shift": 0, "p_u": 0.2}, "shift=0.0 says how much noise is uniform"),
        ({"kind": "uniform", "p_u": 0.2}, "p_u belongs to objective.process.kind=hybrid"),
        ({"kind": "absorbing", "masking": "bernoulli", "shift": 1}, "shift belongs to"),
    ],
)
def test_noise_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises((ValidationError, ConfigError), match=sentence):
        MaskedDiffusionConfig(process=fields)


def test_the_process_chooses_the_loss_head_and_refuses_that_of_another():
    section = MaskedDiffusionConfig(process={"kind": "hybrid"})
    assert section.loss_head.kind == section.held_out_head == "interpolating"
    assert MaskedDiffusionConfig().loss_head.kind == "cross_entropy"
    for process, head in (("hybrid", "cross_entropy"), ("absorbing", "interpolating")):
        with pytest.raises(ValidationError, match=f"kind={head} is no bound of"):
            MaskedDiffusionConfig(process={"kind": process}, loss_head={"kind": head})


def test_weights_that_move_the_optimum_are_named():
    told = {"clip": "has another optimum than the bound", "equal": "has another optimum"}
    told |= {"dynamic": "has the bound's optimum, and another scale", "log_snr": "another scale"}
    for weighting, words in told.items():
        section = MaskedDiffusionConfig(process={"kind": "uniform", "weighting": weighting})
        assert words in section.remark
    assert MaskedDiffusionConfig(process={"kind": "uniform", "weighting": "bound"}).remark is None
    assert MaskedDiffusionConfig().remark is None
