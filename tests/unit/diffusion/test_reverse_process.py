"""A step back, against the exact posterior by enumeration; and whole texts."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.forward_process import draw_tokens
from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.reverse_process import sample_reverse
from megatron_mdm.diffusion.schedules import Cosine, Linear, Polynomial

V, MASK = 3, 3
SCHEDULES = [Linear(), Cosine(), Polynomial(power=2.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: type(one).__name__)
def test_a_step_back_has_the_posterior_of_the_forward_process(schedule):
    """p(x_s | x_t) by Bayes' rule from P(x_s hidden) = m(s), over a grid of draws."""
    process, t, s = AbsorbingProcess(MASK, schedule=schedule), 0.8, 0.3
    probabilities_V = np.array([0.2, 0.5, 0.3])
    hidden_at_t, hidden_at_s = schedule.masked_share(t), schedule.masked_share(s)
    # Given that a token is hidden at t, it was hidden at s with probability m(s) / m(t).
    stays = hidden_at_s / hidden_at_t
    grid = (np.arange(200) + 0.5) / 200
    changes, becomes = (part.ravel() for part in np.meshgrid(grid, grid))
    length = len(changes)
    x_L = process.step_back(
        np.full(length, MASK),
        np.tile(probabilities_V, (length, 1)),
        t,
        s,
        np.concatenate([changes, becomes]),
    )
    found = np.bincount(x_L, minlength=4) / length
    np.testing.assert_allclose(found, [*(1 - stays) * probabilities_V, stays], atol=1 / 200)


def test_what_is_in_sight_stays_and_at_time_0_nothing_is_hidden():
    process = AbsorbingProcess(MASK)
    xt_L = np.array([0, MASK, 2, MASK])
    uniforms_N = np.full(8, 1 - 2**-53)
    x_L = process.step_back(xt_L, np.full((4, V), 1 / V), 0.5, 0.0, uniforms_N)
    assert x_L.tolist() == [0, 2, 2, 2]


def test_texts_have_the_distribution_of_the_model():
    """One token at a time, a perfect model of a joint distribution gives samples of it."""
    joint = {
        pair: p for pair, p in zip(itertools.product(range(2), repeat=2), (4, 1, 2, 3), strict=True)
    }

    def restore(x_L):
        rows = np.zeros((2, 2))
        for pair, weight in joint.items():
            if all(seen in (MASK, token) for seen, token in zip(x_L, pair, strict=True)):
                for place, token in enumerate(pair):
                    rows[place, token] += weight
        return rows / rows.sum(axis=1, keepdims=True)

    count, num_steps = 1000, 32
    found = Counter(
        tuple(
            sample_reverse(
                AbsorbingProcess(MASK), restore, CounterNoise(seed), length=2, num_steps=num_steps
            ).tolist()
        )
        for seed in range(count)
    )
    # Both tokens in one step are drawn independently: with probability 1 / 32.
    for pair, weight in joint.items():
        share = weight / 10
        error = (share * (1 - share) / count) ** 0.5
        assert abs(found[pair] / count - share) < 4 * error + 1 / num_steps


def test_a_prompt_stays():
    x_L = sample_reverse(
        AbsorbingProcess(MASK),
        lambda x_L: np.full((len(x_L), V), 1 / V),
        CounterNoise(1),
        length=6,
        num_steps=3,
        prompt=np.array([2, 0]),
    )
    assert x_L[:2].tolist() == [2, 0]
    assert (x_L != MASK).all()


def test_tokens_are_drawn_by_their_probabilities_and_never_an_impossible_one():
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = draw_tokens(np.tile([0.0, 0.25, 0.75, 0.0], (1000, 1)), grid)
    assert np.bincount(drawn, minlength=4).tolist() == [0, 250, 750, 0]
