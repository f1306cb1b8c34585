"""Estimators against enumeration: every mask of a short continuation, every order of its tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, norm

from megatron_mdm.core.statistics import Estimate, student_reach
from megatron_mdm.diffusion.probes import LikelihoodEstimator, Probe, make_request_noise

LENGTH = 8
NOMINAL = 0.95

# log p(token j | tokens that are not masked), float64 [L].
Model = Callable[[np.ndarray], np.ndarray]


def model_of(joint: np.ndarray, tokens: np.ndarray) -> Model:
    """The exact conditionals of a joint distribution [V, .., V]: all orders agree."""

    def log_probs(hidden_L: np.ndarray) -> np.ndarray:
        found = np.zeros(len(tokens))
        for place in np.flatnonzero(hidden_L):
            others = tuple(np.flatnonzero(hidden_L & (np.arange(len(tokens)) != place)))
            seen = joint.sum(axis=others, keepdims=True)
            index = [0 if hidden else token for hidden, token in zip(hidden_L, tokens, strict=True)]
            index[place] = slice(None)
            found[place] = math.log(seen[tuple(index)][tokens[place]] / seen[tuple(index)].sum())
        return found

    return log_probs


def random_model(seed: int, length: int = LENGTH) -> Model:
    """A model whose orders disagree, as those of a network do."""
    table = -np.random.default_rng(seed).gamma(2.0, 1.0, (2**length, length))

    def log_probs(hidden_L: np.ndarray) -> np.ndarray:
        # Less is known with more hidden, so that the level depends on t.
        return table[int(hidden_L @ (1 << np.arange(length)))] * (0.2 + hidden_L.mean())

    return log_probs


def cached(model: Model) -> Model:
    """The same, each mask asked once."""
    known: dict[bytes, np.ndarray] = {}

    def log_probs(hidden_L: np.ndarray) -> np.ndarray:
        key = hidden_L.tobytes()
        if key not in known:
            known[key] = model(hidden_L)
        return known[key]

    return log_probs


def over_all_orders(model: Model, length: int) -> float:
    """Mean of log p over all orders of revealing the tokens one by one."""
    totals = []
    for order in itertools.permutations(range(length)):
        hidden_L = np.ones(length, dtype=bool)
        total = 0.0
        for place in order:
            total += model(hidden_L)[place]
            hidden_L[place] = False
        totals.append(total)
    return float(np.mean(totals))


def over_all_masks(model: Model, chance_of: Callable[[int], float], length: int) -> float:
    """Sum of log p over masks, each count of hidden tokens with a weight of its own."""
    return sum(
        chance_of(sum(bits)) * float(model(np.array(bits))[np.array(bits)].sum())
        for bits in itertools.product((False, True), repeat=length)
        if any(bits)
    )


def value(probe: Probe, model: Model) -> float:
    return float(probe.weights_L @ model(probe.hidden_L))


def estimate(estimator: LikelihoodEstimator, model: Model, seed: int, rounds: int = 1) -> Estimate:
    noise, zeros = make_request_noise(seed, (1, 2), range(LENGTH)), [0] * LENGTH
    values = [
        np.array([value(probe, model) for probe in estimator.draw_probes(noise, zeros, number)])
        for number in range(rounds)
    ]
    return estimator.combine(LENGTH, values)


@pytest.mark.parametrize("kind", ["fixed_count", "chain_rule"])
def test_of_an_exact_model_both_exact_estimators_give_the_likelihood(kind):
    generator = np.random.default_rng(0)
    joint = generator.dirichlet(np.ones(3**4)).reshape((3,) * 4)
    tokens = generator.integers(0, 3, 4)
    model = model_of(joint, tokens)
    estimator = LikelihoodEstimator(kind, draws=16)
    values = np.array([value(one, model) for one in estimator.draw_probes(None, [0] * 4, 0)])
    assert estimator.is_exact(4)
    found = estimator.combine(4, [values])
    assert found.mean == pytest.approx(math.log(joint[tuple(tokens)]), abs=1e-12)
    assert found.standard_error == 0


def test_all_masks_of_a_short_continuation_are_all_orders():
    model = random_model(1, 5)
    estimator = LikelihoodEstimator("fixed_count", draws=31)
    probes = estimator.draw_probes(None, [0] * 5, 0)
    assert len(probes) == 31
    assert len({tuple(probe.hidden_L) for probe in probes}) == 31
    total = sum(value(probe, model) for probe in probes)
    assert total == pytest.approx(over_all_orders(model, 5), abs=1e-12)
    assert not LikelihoodEstimator("fixed_count", draws=30).is_exact(5)


def fixed_count_weight(count: int) -> float:
    return 1 / (count * math.comb(LENGTH, count))


def bernoulli_weight(count: int, eps: float) -> float:
    def density(t: float) -> float:
        p = (1 - eps) * t + eps
        return binom.pmf(count, LENGTH, p) / math.comb(LENGTH, count) / p

    return quad(density, 0, 1, epsabs=1e-12)[0]


CASES = {
    "fixed count": LikelihoodEstimator("fixed_count", draws=64),
    "fixed count, independent t": LikelihoodEstimator("fixed_count", draws=64, stratified=False),
    "Bernoulli": LikelihoodEstimator("monte_carlo", draws=256, eps=0.05),
    "Bernoulli, independent t": LikelihoodEstimator(
        "monte_carlo", draws=256, eps=0.05, stratified=False
    ),
}


@pytest.mark.parametrize(("name", "rounds"), [*((name, 1) for name in CASES), ("fixed count", 3)])
def test_the_mean_is_the_enumerated_value_and_its_error_is_honest(name, rounds):
    estimator, model = CASES[name], random_model(2)
    weight = fixed_count_weight
    if estimator.kind == "monte_carlo":
        weight = {count: bernoulli_weight(count, estimator.eps) for count in range(LENGTH + 1)}.get
    truth = over_all_masks(model, weight, LENGTH)
    found = [estimate(estimator, model, seed, rounds) for seed in range(500)]
    means = np.array([one.mean for one in found])
    errors = np.array([one.standard_error for one in found])
    assert abs(means.mean() - truth) < 3 * means.std() / math.sqrt(len(means))
    # The root mean square is unbiased where single ones are.
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.1)
    reach = norm.ppf((1 + NOMINAL) / 2) * errors
    assert 0.93 <= np.mean(np.abs(means - truth) <= reach) <= 0.97


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("draws", [8, 16, 32, 64])
def test_intervals_of_few_draws_hold_the_enumerated_value(draws, stratified):
    """95% of them, by the quantile of as many degrees of freedom as the error has."""
    estimator = LikelihoodEstimator("fixed_count", draws, stratified)
    model = cached(random_model(2))
    truth = over_all_masks(model, fixed_count_weight, LENGTH)
    found = [estimate(estimator, model, seed) for seed in range(1000)]
    degrees = estimator.degrees_of_freedom(LENGTH, 1)
    covered = np.mean([abs(mean - truth) <= student_reach(err, degrees) for mean, err in found])
    # Binomial noise of 1,000 intervals is 0.007; three times that below what is promised.
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000)
    # Strata of few draws differ by their t too, so the error is a little too large, not too small.
    assert covered <= (0.99 if stratified else 0.97)
    if draws == 8 and not stratified:
        # What the normal quantile covers, so that the test can tell the two apart.
        assert np.mean([abs(mean - truth) <= 1.96 * err for mean, err in found]) < 0.92


@pytest.mark.parametrize("rounds", [2, 4])
def test_rounds_of_few_draws_have_the_degrees_of_all(rounds):
    estimator, model = LikelihoodEstimator("fixed_count", 4), cached(random_model(5))
    truth = over_all_masks(model, fixed_count_weight, LENGTH)
    degrees = estimator.degrees_of_freedom(LENGTH, rounds)
    assert degrees == rounds * estimator.degrees_of_freedom(LENGTH, 1)
    found = [estimate(estimator, model, seed, rounds) for seed in range(500)]
    covered = np.mean([abs(mean - truth) <= student_reach(err, degrees) for mean, err in found])
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 500)


def test_an_exact_estimate_has_no_error_to_be_uncertain_of():
    assert LikelihoodEstimator("fixed_count", 255).degrees_of_freedom(8, 1) == math.inf
    assert LikelihoodEstimator("chain_rule", 8).degrees_of_freedom(50, 1) == math.inf
    assert LikelihoodEstimator("monte_carlo", 33, stratified=False).degrees_of_freedom(8, 2) == 64


def test_noise_belongs_to_the_request():
    estimator = LikelihoodEstimator("fixed_count", draws=8)

    def masks(seed, context, continuation, number=0):
        noise = make_request_noise(seed, context, continuation)
        return [tuple(p.hidden_L) for p in estimator.draw_probes(noise, continuation, number)]

    first = masks(0, (1, 2), (3, 4, 5, 6))
    assert first == masks(0, [1, 2], [3, 4, 5, 6])
    others = [
        masks(1, (1, 2), (3, 4, 5, 6)),
        masks(0, (1, 3), (3, 4, 5, 6)),
        masks(0, (1, 2), (3, 4, 5, 7)),
        masks(0, (1, 2), (3, 4, 5, 6), number=1),
    ]
    assert all(first != other for other in others)
    # Where a continuation begins is a part of the request.
    assert make_request_noise(0, (1,), (2, 3)).uniform(0, 0) != make_request_noise(
        0, (1, 2), (3,)
    ).uniform(0, 0)
