"""Interpolating noise against its published and recomputed values, and against enumeration."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bound_reference import (
    JOINT,
    MASK,
    N,
    bound,
    exact_x_hat,
    full_q,
    integrate,
    posterior,
    term,
    weight,
)

from megatron_mdm.diffusion.interpolation import (
    HybridNoise,
    ShiftedNoise,
    UniformNoise,
    describe_noise,
    read_noise,
)

MASKED, UNIFORM = HybridNoise(N, 0.0), UniformNoise(N)
SMALL, LARGE = HybridNoise(N, 0.1), HybridNoise(N, 0.2)
STEEP, SHIFTED = HybridNoise(N, 0.2, 2.0), ShiftedNoise(N, 0.0)
ALL = {
    "masked": MASKED,
    "p_u=.1": SMALL,
    "p_u=.2": LARGE,
    "p_u=.2, gamma=2": STEEP,
    "uniform": UNIFORM,
    "shift 0": SHIFTED,
}


def copying(noise, t, z, place):
    """x_hat that favours the token of the other place."""
    x_hat_V = np.ones(N)
    if z[1 - place] != MASK:
        x_hat_V[z[1 - place]] += 1
    return x_hat_V / x_hat_V.sum()


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
@pytest.mark.parametrize("t", [0.01, 0.3, 0.5, 0.97])
def test_chances_sum_to_one_and_weights_are_jump_rates_over_chances(noise, t):
    step = 1e-6
    q, before, after = full_q(noise, t), full_q(noise, t - step), full_q(noise, t + step)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-14)
    # The rate into z without what stays: d/dt (q - a [z = x0]) - (a' / a) (q - a [z = x0]).
    a, slope = noise.at(t).clean, (noise.at(t + step).clean - noise.at(t - step).clean) / 2 / step
    for x0, z in ((0, 1), (0, 0), (0, MASK)):
        if q[x0, z] - a * (x0 == z) <= 0:
            continue
        here = q[x0, z] - a * (x0 == z)
        moving = (after - before)[x0, z] / 2 / step - slope * (x0 == z)
        rate = moving - slope / a * here
        assert weight(noise, t, x0, z) == pytest.approx(rate / q[x0, z], rel=1e-5)


def test_the_shift_turns_masked_into_uniform_noise():
    for t in (0.001, 0.2, 0.9):
        np.testing.assert_allclose(ShiftedNoise(N, -1000).at(t)[:4], MASKED.at(t)[:4], rtol=1e-12)
        found, expected = ShiftedNoise(N, 1000).at(t), UNIFORM.at(t)
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-12)
        np.testing.assert_allclose(found[4:], expected[4:], rtol=1e-12)


def test_half_way_the_stated_share_of_tokens_is_uniform_noise():
    for p_u, gamma in ((0.1, 1.0), (0.2, 2.0), (0.5, 0.3)):
        assert N * HybridNoise(N, p_u, gamma).at(0.5).uniform == pytest.approx(p_u)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (LARGE, [0.114820771, 2.450865950, 1.893853214, 1.391613478]),
        (SMALL, [0.068068454, 4.160509581, 3.377697561, 1.888701084]),
        (UNIFORM, [0.279313581, 4.703846600, 3.680695583]),
    ],
    ids=["p_u=.2", "p_u=.1", "uniform"],
)
def test_pointwise_terms(noise, expected):
    x_hat_V = np.array([0.5, 0.3, 0.2])
    found = [term(noise, 0.25, 0, z, x_hat_V) for z in range(len(expected))]
    np.testing.assert_allclose(found, expected, atol=5e-10)


def test_weights_of_a_large_vocabulary():
    at = HybridNoise(50257, 0.1).at(0.3)
    found = (at.mask_weight, at.wrong_weight, at.right_weight)
    assert found == pytest.approx((4.761905, 2.380952, 6.892e-6), rel=1e-4)


def test_without_uniform_noise_the_term_is_the_masked_one():
    x_hat_V = np.array([0.5, 0.3, 0.2])
    for t in (0.02, 0.6):
        assert term(MASKED, t, 1, MASK, x_hat_V) == pytest.approx(-np.log(0.3) / t)
        assert term(MASKED, t, 1, 1, x_hat_V) == 0


def test_uniform_is_the_published_formula():
    # arXiv 2506.10892: a' / (N a) [N / x_z - N / y_z - sum (x_j / x_z) ln(y_z x_j / (y_j x_z))].
    x_hat_V = np.array([0.5, 0.3, 0.2])
    for t in (0.1, 0.7):
        a = 1 - t
        for x0 in range(N):
            for z in range(N):
                x_V = N * a * np.eye(N)[x0] + 1 - a
                y_V = N * a * x_hat_V + 1 - a
                logs_V = np.log(y_V[z] * x_V / (y_V * x_V[z]))
                inside = N / x_V[z] - N / y_V[z] - np.sum(x_V / x_V[z] * logs_V)
                expected = -1 / (N * a) * inside
                assert term(UNIFORM, t, x0, z, x_hat_V) == pytest.approx(expected, abs=1e-13)


EXACT = [("masked", (0.881794296, 0.727643616)), ("p_u=.1", (0.881207938, 0.728229972))]
EXACT += [("p_u=.2", (0.880768204, 0.728669703)), ("uniform", (0.880070461, 0.729367452))]


@pytest.mark.parametrize(("name", "expected"), EXACT)
def test_the_exact_predictor_pays_the_stated_share_at_each_token(name, expected):
    np.testing.assert_allclose(bound(ALL[name], (0, 0), exact_x_hat), expected, atol=3e-8)


@pytest.mark.parametrize("name", ALL)
def test_with_the_exact_predictor_the_bound_is_the_log_likelihood(name):
    for x0 in ((0, 0), (0, 1), (2, 2)):
        assert sum(bound(ALL[name], x0, exact_x_hat)) == pytest.approx(-np.log(JOINT[x0]), abs=3e-8)


TABLE = {
    "masked": (1.79175947, 2.48490665, 1.60943791, 2.99573227, 1.38629436),
    "p_u=.1": (1.752187, 2.527452, 2.253601, 3.242176, 2.067907),
    "p_u=.2": (1.729075, 2.556427, 2.515609, 3.310826, 2.343784),
    "p_u=.2, gamma=2": (1.73495549, 2.54891989, 2.43860763, 3.28878661, 2.26343743),
    "uniform": (1.69854342, 2.61646419, 2.82087553, 3.39704447, 2.66402382),
    "shift 0": (1.72072352, 2.56606025, 2.59184493, 3.31814275, 2.41486561),
}


@pytest.mark.parametrize("name", TABLE)
def test_wrong_predictors_have_the_stated_bounds(name):
    noise = ALL[name]
    found = [sum(bound(noise, x0, copying)) for x0 in ((0, 0), (0, 1))]
    found += [sum(bound(noise, x0, posterior)) for x0 in ((0, 0), (0, 1), (2, 2))]
    digits = 1e-6 if name in ("p_u=.1", "p_u=.2") else 1e-7
    np.testing.assert_allclose(found, TABLE[name], atol=digits)


@pytest.mark.parametrize("name", ALL)
def test_a_predictor_without_context_costs_its_cross_entropy(name):
    for x_hat_V in (np.full(N, 1 / N), np.array([0.5, 0.3, 0.2])):
        for x0 in range(N):

            def at_time(t, x0=x0, x_hat_V=x_hat_V):
                q_V = full_q(ALL[name], t)[x0]
                seen = [z for z in range(N + 1) if q_V[z] > 0]
                return sum(q_V[z] * term(ALL[name], t, x0, z, x_hat_V) for z in seen)

            assert integrate(at_time) == pytest.approx(-np.log(x_hat_V[x0]), abs=3e-8)


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_noise_is_read_as_it_was_described(noise):
    assert read_noise(json.loads(json.dumps(describe_noise(noise)))) == noise


@pytest.mark.parametrize("fields", [{}, {"kind": "pink"}, {"kind": "uniform", "shift": 1}])
def test_noise_of_another_kind_is_refused(fields):
    with pytest.raises(ValueError, match="describes no noise: use hybrid, shifted, uniform"):
        read_noise(fields)
