"""A forward process from outside the package is undone by its own step back."""

from __future__ import annotations

import numpy as np
from own_process import UniformProcess

from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.reverse_process import sample_reverse

V = 3


def transition(t: float) -> np.ndarray:
    """q(x_t | x_0) as a matrix [x_0, x_t]: a share t becomes any token."""
    return (1 - t) * np.eye(V) + t / V


def test_a_step_back_is_bayes_rule():
    process, t, s = UniformProcess(V), 0.7, 0.2
    clean_V = np.array([0.6, 0.3, 0.1])
    keeps = (1 - t) / (1 - s)
    between = keeps * np.eye(V) + (1 - keeps) / V
    for xt in range(V):
        # p(x_s, x_0 | x_t) summed over x_0, where the model says clean_V of x_0 given x_t.
        joint = transition(s) * between[:, xt] / transition(t)[:, xt, None]
        expected_V = clean_V @ joint
        grid = (np.arange(5000) + 0.5) / 5000
        uniforms_N = np.concatenate([grid, grid])
        found = process.step_back(np.full(5000, xt), np.tile(clean_V, (5000, 1)), t, s, uniforms_N)
        np.testing.assert_allclose(np.bincount(found, minlength=V) / 5000, expected_V, atol=1e-3)


def test_corruption_has_the_stated_transition():
    uniforms = np.random.default_rng(0).random(2 * 30_000)
    xt = UniformProcess(V).corrupt(np.full(30_000, 1), 0.6, uniforms).xt_L
    np.testing.assert_allclose(np.bincount(xt) / 30_000, transition(0.6)[1], atol=0.012)


def test_a_sure_model_is_reached_whatever_the_noise():
    text = np.array([2, 0, 1, 1, 2])
    for seed in range(20):
        found = sample_reverse(
            UniformProcess(V),
            lambda x_L: np.eye(V)[text],
            CounterNoise(seed),
            length=5,
            num_steps=4,
        )
        assert found.tolist() == text.tolist()
