"""Intervals: their coverage on synthetic runs, and what the public runs leave open."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, f

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import CONFIDENCE, Interval, percentile_interval
from megatron_mdm.studies.laws.coordinates import HUBER_WIDTH, Coordinates
from megatron_mdm.studies.laws.fitting import Fit, fit_law, objective
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw, predicted_losses
from megatron_mdm.studies.laws.runs import Runs
from megatron_mdm.studies.laws.uncertainty import (
    bootstrap,
    constant_interval,
    likelihood_ratio_factor,
    profile,
)

TRUTH = DataConstrainedLaw(400.0, 900.0, 1.7, 0.34, 0.31, 12.0, 6.0)
FITTED = ("irreducible_loss", "token_reuse")
HELD = {name: getattr(TRUTH, name) for name in TRUTH.names() if name not in FITTED}
NUM_DATA_SETS = 30


def lowest_count() -> int:
    """So many of the data sets an honest interval covers at least, but for one time in 1,000."""
    return int(binom.ppf(0.001, NUM_DATA_SETS, CONFIDENCE))


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(grid_of):
    covered = {"bootstrap E": 0, "bootstrap R_D": 0, "profile R_D": 0, "loss": 0}
    far = (3e9, 1e12, 1e10)
    true_loss = float(predicted_losses([TRUTH], *far)[0, 0])
    for seed in range(NUM_DATA_SETS):
        runs = grid_of(TRUTH, (4, 3, 4), noise=0.01, seed=seed)
        starts = {"irreducible_loss": [1.5], "token_reuse": [8.0]}
        fit = fit_law(runs, DataConstrainedLaw, held=HELD, starts=starts)
        laws = bootstrap(runs, fit, 40, seed=seed)
        around = profile(runs, fit, "token_reuse", Interval(6, 24), num_points=9)
        losses = predicted_losses(laws, *far)[:, 0].tolist()
        for name, interval, true in (
            ("bootstrap E", constant_interval(fit, laws, "irreducible_loss"), 1.7),
            ("bootstrap R_D", constant_interval(fit, laws, "token_reuse"), 12.0),
            ("profile R_D", around.interval, 12.0),
            ("loss", percentile_interval(losses), true_loss),
        ):
            covered[name] += interval.low <= true <= interval.high
    assert min(covered.values()) >= lowest_count(), covered
    # Nor are they wide for safety: an interval that always covers says too little.
    assert min(covered.values()) < NUM_DATA_SETS, covered


def test_resamples_follow_their_seed(grid_of):
    runs = grid_of(TRUTH, (4, 3, 4), noise=0.01)
    fit = fit_law(runs, DataConstrainedLaw, held=HELD)
    assert bootstrap(runs, fit, 5, seed=1) == bootstrap(runs, fit, 5, seed=1)
    assert bootstrap(runs, fit, 5, seed=1) != bootstrap(runs, fit, 5, seed=2)
    assert bootstrap(runs, fit, 0) == []


def test_a_resample_is_a_fit_of_its_runs(grid_of):
    """The law of a resample is the one that a fit to these very runs finds."""
    runs = grid_of(TRUTH, (4, 3, 4), noise=0.01)
    fit = fit_law(runs, DataConstrainedLaw, held=HELD)
    (law,) = bootstrap(runs, fit, 1, seed=3)
    drawn = np.random.default_rng(3).integers(len(runs), size=(1, len(runs)))[0]
    again = runs.take(drawn)
    other = fit_law(again, DataConstrainedLaw, held=HELD)
    assert objective(law, again) == pytest.approx(other.objective, rel=1e-5)
    assert law.token_reuse == pytest.approx(other.law.token_reuse, rel=0.01)


def test_small_residuals_give_the_likelihood_ratio_of_normal_noise():
    """Within the Huber width the objective is half the sum of squares: 2 / s^2, and Student's t.

    E alone is free and its logarithm is the mean of log losses: the interval has a closed form.
    """
    generator = np.random.default_rng(0)
    logs = 1 + 1e-4 * generator.standard_normal(30)
    ones = np.ones(30)
    runs = Runs(ones, ones, ones, np.exp(logs))
    held = dict.fromkeys(ChinchillaLaw.names(), 1e-9)
    held.pop("irreducible_loss")
    fit = fit_law(runs, ChinchillaLaw, held=held)
    assert likelihood_ratio_factor(fit, runs) == pytest.approx(2 / logs.var(ddof=1), rel=1e-3)
    reach = math.sqrt(f.ppf(CONFIDENCE, 1, 29) * logs.var(ddof=1) / 30)
    low, high = profile(runs, fit, "irreducible_loss").interval
    assert math.log(low) == pytest.approx(logs.mean() - reach, abs=0.05 * reach)
    assert math.log(high) == pytest.approx(logs.mean() + reach, abs=0.05 * reach)


def test_large_residuals_give_the_ratio_of_absolute_values():
    """Beyond the width psi is the width: 2 f(0) / width times 2, and f(0) of a known density."""
    size = np.linspace(-0.5, 0.5, 4001)  # uniform: f(0) = 1
    ones = np.ones(4001)
    held = dict.fromkeys(ChinchillaLaw.names()[:2], 1e-9)
    coordinates = Coordinates(ChinchillaLaw, ("irreducible_loss",), held, False, {})
    fit = Fit(ChinchillaLaw(1e-9, 1e-9, 1.0, 1.0, 1.0), 0.0, 1, coordinates)
    factor = likelihood_ratio_factor(fit, Runs(ones, ones, ones, np.exp(size)))
    assert factor == pytest.approx(4 / HUBER_WIDTH, rel=0.02)


def test_the_profile_of_the_public_runs_is_nearly_flat_from_fifteen_on(public_runs, published):
    held = dict(zip(published.names()[:5], published.values(), strict=False))
    fit = fit_law(public_runs, DataConstrainedLaw, held=held)
    found = profile(public_runs, fit, "token_reuse", Interval(12, 120), num_points=25)
    at_published = objective(published, public_runs)
    values, sums = np.array(found.values), np.array(found.objectives)
    lower = values[sums < at_published]
    assert lower.min() < 30
    for elsewhere in (47, 95):
        nearest = np.abs(values - elsewhere).argmin()
        assert 0.998 < sums[nearest] / at_published < 0.9995
    # All of it is below the threshold: neither end of the interval lies in here.
    assert found.interval == (0, math.inf)
    assert found.is_weakly_identified
    assert found.threshold > sums.max()


def test_a_constant_that_was_held_has_no_profile(grid_of):
    runs = grid_of(TRUTH, (4, 3, 4), noise=0.01)
    fit = fit_law(runs, DataConstrainedLaw, held=HELD)
    with pytest.raises(DataError, match="token_scale needs a fit of it"):
        profile(runs, fit, "token_scale")


def test_the_profile_of_a_tied_exponent_moves_both(grid_of):
    law = ChinchillaLaw(400.0, 900.0, 1.7, 0.33, 0.33)
    runs = grid_of(law, (5, 4, 3), noise=0.003)
    fit = fit_law(runs, ChinchillaLaw, tie_exponents=True)
    found = profile(runs, fit, "token_exponent")
    assert found.lowest == pytest.approx(fit.objective, rel=1e-3)
    assert found.interval.low < fit.law.token_exponent < found.interval.high
    assert not found.is_weakly_identified
    assert found.interval.high / found.interval.low < 1.3
