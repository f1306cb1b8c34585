"""Schedules: one bound whatever the schedule, by integrals that are known exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad

from megatron_mdm.diffusion.forward_process import Corruption
from megatron_mdm.diffusion.left_to_right import hide_last_tokens
from megatron_mdm.diffusion.masking import (
    bernoulli_masking,
    fixed_count_masking,
    masking_probability,
)
from megatron_mdm.diffusion.schedules import Cosine, Linear, NoiseSchedule, Polynomial

L = 5
SUBSETS = [np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=L)]
# What a denoiser might pay for filling in each subset: anything, but nothing for nothing.
COSTS = np.random.default_rng(0).random(len(SUBSETS)) * [subset.sum() for subset in SUBSETS]
SCHEDULES = [
    Linear(),
    Cosine(),
    Polynomial(power=2.0),
    Polynomial(power=0.7),
]


def bernoulli_mean(schedule: NoiseSchedule, eps: float, low: float, high: float) -> float:
    """Mean over t in the range of the mean over masks of weight * cost."""

    def integrand(t: float) -> float:
        p = masking_probability(schedule.masked_share(t), eps)
        total = 0.0
        for subset, cost in zip(SUBSETS, COSTS, strict=True):
            draw = bernoulli_masking(np.where(subset, 0.0, 1.0), t, eps, schedule)
            chance = p ** subset.sum() * (1 - p) ** (L - subset.sum())
            total += chance * draw.weight * cost
        return total

    return quad(integrand, low, high, epsabs=1e-12, epsrel=1e-12)[0] / (high - low)


def fixed_count_mean(schedule: NoiseSchedule, low: float, high: float) -> float:
    """The same by the exact chance of every count."""
    total = 0.0
    for count in range(1, L + 1):
        start = max(schedule.time_of((count - 1) / L), low)
        stop = min(schedule.time_of(count / L), high)
        if start >= stop:
            continue
        of_count = [
            (subset, cost)
            for subset, cost in zip(SUBSETS, COSTS, strict=True)
            if subset.sum() == count
        ]
        for subset, cost in of_count:
            uniforms_L = np.where(subset, 0.1, 0.9)
            draw = fixed_count_masking(uniforms_L, 0.5 * (start + stop), schedule)
            assert draw.mask_L.tolist() == subset.tolist()
            total += (stop - start) / (high - low) * draw.weight * cost / len(of_count)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_every_schedule_has_the_expectation_of_the_linear_one(schedule):
    linear = SCHEDULES[0]
    assert fixed_count_mean(schedule, 0, 1) == pytest.approx(fixed_count_mean(linear, 0, 1))
    for eps in (1e-3, 0.2):
        expected = bernoulli_mean(linear, eps, 0, 1)
        assert bernoulli_mean(schedule, eps, 0, 1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_share_slope_and_time_belong_together(schedule):
    assert (schedule.masked_share(0.0), schedule.masked_share(1.0)) == pytest.approx(
        (0.0, 1.0), abs=1e-15
    )
    for t in (0.01, 0.3, 0.77, 0.99):
        step = 1e-6
        slope = (schedule.masked_share(t + step) - schedule.masked_share(t - step)) / (2 * step)
        assert schedule.slope(t) == pytest.approx(slope, rel=1e-6)
        assert schedule.time_of(schedule.masked_share(t)) == pytest.approx(t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.2, 0.9), (0.45, 0.5)])
def test_mean_shares_and_counts_are_integrals(schedule, times):
    low, high = times
    ranged = replace(schedule, t_min=low, t_max=high)
    integral = quad(schedule.masked_share, low, high)[0]
    assert ranged.mean_share() == pytest.approx(integral / (high - low), rel=1e-9)
    counts = [math.ceil(schedule.masked_share(t) * L) for t in np.linspace(low, high, 200_001)[1:]]
    assert ranged.mean_count(L) == pytest.approx(np.mean(counts), abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_weights_make_the_loss_the_mean_over_masked_tokens(schedule):
    """All masked tokens of many draws together weigh as much as all tokens."""
    equal = replace(schedule, weighting="equal")
    rng = np.random.default_rng(1)
    for draw_of in (
        lambda u, t: bernoulli_masking(u, t, 1e-3, equal),
        lambda u, t: fixed_count_masking(u, t, equal),
    ):
        draws = [draw_of(rng.random(20), t) for t in (np.arange(4000) + 0.5) / 4000]
        assert len({draw.weight for draw in draws}) == 1
        masked = np.mean([draw.weight * draw.mask_L.sum() / 20 for draw in draws])
        assert masked == pytest.approx(1.0, abs=0.01)


def test_a_range_of_times_is_drawn_evenly():
    schedule = Linear(t_min=0.25, t_max=0.75)
    assert [schedule.time(u) for u in (0.5, 1.0)] == [0.5, 0.75]
    assert schedule.time(1e-12) == pytest.approx(0.25)


@pytest.mark.parametrize("hidden", range(L + 1))
def test_left_to_right_hides_as_many_and_nothing_stays_nothing(hidden):
    x0_L, mask_L = np.arange(L), np.arange(L) < hidden
    drawn = Corruption(np.where(mask_L, 99, x0_L), np.where(mask_L, 1.5, 0.0))
    moved = hide_last_tokens(drawn, x0_L)
    last_L = np.arange(L) >= L - hidden
    assert moved.xt_L.tolist() == np.where(last_L, 99, x0_L).tolist()
    assert moved.weights_L.tolist() == np.where(last_L, 1.5, 0.0).tolist()
