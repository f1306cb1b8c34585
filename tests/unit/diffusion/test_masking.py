from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from megatron_mdm.diffusion.masking import (
    bernoulli_masking,
    fixed_count_masking,
    masking_probability,
)

V, L = 3, 4
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
SUBSETS = [np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=L) if any(bits)]
RNG = np.random.default_rng(0)
JOINT = RNG.dirichlet(np.full(V**L, 0.5))


def conditional_cost(x: np.ndarray, hidden: np.ndarray) -> float:
    """Sum of -log p(x_i | what is visible) over hidden i, by summing the joint."""
    visible = (SEQUENCES[:, ~hidden] == x[~hidden]).all(1)
    costs = [
        -math.log(JOINT[visible & (SEQUENCES[:, i] == x[i])].sum() / JOINT[visible].sum())
        for i in np.flatnonzero(hidden)
    ]
    return math.fsum(costs)


def fixed_count_bound(costs: list[float]) -> float:
    """Mean over l of the mean over subsets of size l, with the weights that the code gives."""
    total = 0.0
    for hidden, cost in zip(SUBSETS, costs, strict=True):
        count = int(hidden.sum())
        # Draws that are small exactly where the subset is make the code pick that subset.
        draw = fixed_count_masking(np.where(hidden, 0.1, 0.9), (count - 0.5) / L)
        assert draw.mask_L.tolist() == hidden.tolist()
        total += draw.weight * cost / math.comb(L, count) / L
    return total


def bernoulli_bound(costs: list[float], eps: float) -> float:
    """Integral over t by Gauss-Legendre, exact for the polynomials in t that occur here."""
    nodes, areas = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for t, area in zip((nodes + 1) / 2, areas / 2, strict=True):
        p = masking_probability(t, eps)
        for hidden, cost in zip(SUBSETS, costs, strict=True):
            draw = bernoulli_masking(np.where(hidden, 0.0, 1.0), t, eps)
            assert draw.mask_L.tolist() == hidden.tolist()
            count = int(hidden.sum())
            total += area * p**count * (1 - p) ** (L - count) * draw.weight * cost
    return total


def beta_integral_bound(costs: list[float], eps: float) -> float:
    """Integral of p^(l-1) (1-p)^(L-l) from eps to 1, divided by 1 - eps, by antiderivatives."""
    total = 0.0
    for hidden, cost in zip(SUBSETS, costs, strict=True):
        count = int(hidden.sum())
        density = Polynomial([0, 1]) ** (count - 1) * Polynomial([1, -1]) ** (L - count)
        integral = density.integ()
        total += (integral(1.0) - integral(eps)) / (1 - eps) * cost
    return total


RANDOM_COSTS = [
    float(hidden.sum() * cost) for hidden, cost in zip(SUBSETS, RNG.random(15), strict=True)
]


@pytest.mark.parametrize("index", range(0, 81, 5))
def test_with_exact_conditionals_the_bound_is_the_log_likelihood(index):
    x = SEQUENCES[index]
    costs = [conditional_cost(x, hidden) for hidden in SUBSETS]
    assert fixed_count_bound(costs) == pytest.approx(-math.log(JOINT[index]), abs=1e-12)
    assert bernoulli_bound(costs, 0.0) == pytest.approx(-math.log(JOINT[index]), abs=1e-12)


def test_both_forms_have_one_expectation_for_any_denoiser():
    beta = math.fsum(
        math.gamma(count) * math.gamma(L - count + 1) / math.gamma(L + 1) * cost
        for count, cost in zip((int(s.sum()) for s in SUBSETS), RANDOM_COSTS, strict=True)
    )
    assert fixed_count_bound(RANDOM_COSTS) == pytest.approx(beta, abs=1e-12)
    assert bernoulli_bound(RANDOM_COSTS, 0.0) == pytest.approx(beta, abs=1e-12)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.5])
def test_eps_shifts_the_bernoulli_form_by_the_integral_it_leaves_out(eps):
    expected = beta_integral_bound(RANDOM_COSTS, eps)
    assert bernoulli_bound(RANDOM_COSTS, eps) == pytest.approx(expected, abs=1e-12)
    assert abs(expected - fixed_count_bound(RANDOM_COSTS)) > eps / 100


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_random_bernoulli_masks_reach_the_exact_expectation(eps):
    rng = np.random.default_rng(1)
    cost_of = {tuple(hidden): cost for hidden, cost in zip(SUBSETS, RANDOM_COSTS, strict=True)}
    values = np.array(
        [
            draw.weight * cost_of.get(tuple(draw.mask_L), 0.0)
            for draw in (
                bernoulli_masking(rng.random(L), 1 - rng.random(), eps) for _ in range(40_000)
            )
        ]
    )
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - beta_integral_bound(RANDOM_COSTS, eps)) < 4 * error


def test_random_fixed_count_masks_reach_the_exact_expectation():
    rng = np.random.default_rng(2)
    cost_of = {tuple(hidden): cost for hidden, cost in zip(SUBSETS, RANDOM_COSTS, strict=True)}
    draws = [fixed_count_masking(rng.random(L), 1 - rng.random()) for _ in range(20_000)]
    values = np.array([draw.weight * cost_of[tuple(draw.mask_L)] for draw in draws])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - fixed_count_bound(RANDOM_COSTS)) < 4 * error


def test_a_uniform_predictor_costs_ln_v_a_token():
    costs = [math.log(V) * int(hidden.sum()) for hidden in SUBSETS]
    assert fixed_count_bound(costs) / L == pytest.approx(math.log(V), abs=1e-14)
    for eps in (0.0, 1e-3, 0.5):
        assert bernoulli_bound(costs, eps) / L == pytest.approx(math.log(V), abs=1e-14)


def test_a_uniform_predictor_costs_ln_v_on_average_over_bernoulli_draws():
    rng = np.random.default_rng(3)
    draws = [bernoulli_masking(rng.random(64), 1 - rng.random(), 1e-3) for _ in range(20_000)]
    values = np.array([draw.weight * draw.mask_L.sum() / 64 * math.log(V) for draw in draws])
    assert abs(values.mean() - math.log(V)) < 4 * values.std() / math.sqrt(len(values))


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True), st.integers(0, 2**32 - 1))
def test_a_uniform_predictor_has_no_variance_with_a_fixed_count(length, t, seed):
    draw = fixed_count_masking(np.random.default_rng(seed).random(length), t)
    assert draw.weight * int(draw.mask_L.sum()) == pytest.approx(length, rel=1e-14)


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True))
def test_the_fixed_count_is_t_of_the_length_rounded_up(length, t):
    count = int(fixed_count_masking(np.linspace(0, 0.99, length), t).mask_L.sum())
    assert 1 <= count <= length
    assert count - 1 < t * length <= count or count == 1


def test_stratified_times_give_every_count_once():
    rng = np.random.default_rng(4)
    counts = [
        int(fixed_count_masking(rng.random(50), (slot + 0.3) / 50).mask_L.sum())
        for slot in range(50)
    ]
    assert counts == list(range(1, 51))


def test_every_subset_of_a_size_is_equally_likely():
    rng = np.random.default_rng(5)
    masks = np.array([fixed_count_masking(rng.random(5), 0.4).mask_L for _ in range(10_000)])
    assert (masks.sum(1) == 2).all()
    counts = np.unique(masks @ (1 << np.arange(5)), return_counts=True)[1]
    assert len(counts) == 10
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # chi-square, 9 degrees, 1 in 10,000


def test_bernoulli_masks_hit_their_rate():
    rng = np.random.default_rng(6)
    for t in (0.0, 0.3, 1.0):
        p = 0.9 * t + 0.1
        rate = bernoulli_masking(rng.random(100_000), t, 0.1).mask_L.mean()
        assert abs(rate - p) <= 4 * math.sqrt(p * (1 - p) / 100_000)


def test_the_ends_of_time():
    draws = np.random.default_rng(7).random(1000)
    assert masking_probability(1.0, 1e-3) == pytest.approx(1.0, abs=1e-15)
    assert bernoulli_masking(draws, 1.0, 1e-3).mask_L.all()
    assert fixed_count_masking(draws, 1.0).mask_L.all()
    assert fixed_count_masking(draws, 1e-300).mask_L.sum() == 1


def test_a_fixed_count_has_far_less_variance():
    # A denoiser whose cost a token grows with the share of hidden tokens, as any good one's does.
    rng = np.random.default_rng(8)
    length, draws = 20, 4000

    def spread(maskings) -> float:
        counts_and_weights = [(masking.mask_L.sum(), masking.weight) for masking in maskings]
        return float(np.std([w * c * (1 + c / length) / length for c, w in counts_and_weights]))

    times = 1 - rng.random(draws)
    fixed = spread(fixed_count_masking(rng.random(length), t) for t in times)
    bernoulli = spread(bernoulli_masking(rng.random(length), t, 1e-3) for t in times)
    assert fixed < 0.5 * bernoulli
