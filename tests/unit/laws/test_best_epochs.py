"""Best numbers of epochs of fits: coverage, and what runs that never overfit leave open."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.studies.laws.best_epochs import analyze_best_epochs, count_beyond, places_of
from megatron_mdm.studies.laws.fitting import fit_law
from megatron_mdm.studies.laws.forms import ChinchillaLaw
from megatron_mdm.studies.laws.overfitting import OverfittingLaw
from megatron_mdm.studies.laws.runs import Runs
from megatron_mdm.studies.laws.uncertainty import bootstrap, profile_best_epochs

TRUTH = OverfittingLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.0233, 1.0, 1.5)
# What is known of sizes and fresh tokens is held, so that a fit takes hundredths of a second.
HELD = dict(zip(TRUTH.names()[:5], TRUTH.values(), strict=False))
STARTS = {"capacity_exponent": [0.8], "overfitting_exponent": [1.2]}
PLACE = (2e8, 1e9)
NUM_DATA_SETS = 30


def make_runs(most_epochs: float, noise: float, seed: int, shape=(3, 2, 5)) -> Runs:
    sizes, unique = np.geomspace(5e7, 8e8, shape[0]), np.geomspace(3e8, 3e9, shape[1])
    axes = np.meshgrid(sizes, unique, np.geomspace(1, most_epochs, shape[2]), indexing="ij")
    n, u, e = (axis.flatten() for axis in axes)
    losses = TRUTH.loss(num_parameters=n, num_tokens=u * e, unique_tokens=u)
    errors = np.random.default_rng(seed).standard_normal(len(n))
    return Runs(n, u * e, u, losses * np.exp(noise * errors))


@pytest.mark.slow
def test_intervals_of_best_epochs_cover_the_truth_as_often_as_they_say():
    covered = {"bootstrap": 0, "profile": 0, "a": 0, "b": 0}
    true = float(TRUTH.best_epochs(num_parameters=PLACE[0], unique_tokens=PLACE[1]))
    true_a, true_b = OverfittingLaw.best_epochs_exponents(np.array(TRUTH.values()), *PLACE)
    for seed in range(NUM_DATA_SETS):
        runs = make_runs(30, 0.01, seed)
        fit = fit_law(runs, OverfittingLaw, held=HELD, starts=STARTS)
        laws = bootstrap(runs, fit, 40, seed=seed)
        found = analyze_best_epochs(fit, runs, laws, [PLACE])
        reach = Interval(true / 1.6, true * 1.6)
        along = profile_best_epochs(runs, fit, *PLACE, reach, num_points=7)
        exponents = found.exponents
        for name, interval, value in (
            ("bootstrap", found.points[0].interval, true),
            ("profile", along.interval, true),
            ("a", exponents.unique_interval, true_a),
            ("b", exponents.parameter_interval, true_b),
        ):
            covered[name] += interval.low <= value <= interval.high
    # Percentiles of so few runs are a little narrow: 90% is what is asked of them here.
    assert min(covered.values()) >= int(binom.ppf(0.001, NUM_DATA_SETS, 0.9)), covered
    assert covered["profile"] >= int(binom.ppf(0.001, NUM_DATA_SETS, CONFIDENCE)), covered
    assert min(covered.values()) < NUM_DATA_SETS, covered


def test_a_profile_of_best_epochs_is_lowest_at_the_fit():
    runs = make_runs(30, 0.01, 1)
    fit = fit_law(runs, OverfittingLaw, held=HELD, starts=STARTS)
    found = analyze_best_epochs(fit, runs, profiled=[PLACE], places=[PLACE])
    (point,) = found.points
    assert point.profile.lowest == pytest.approx(fit.objective, rel=1e-6)
    assert point.profile.estimate == point.epochs
    assert point.profile.interval.low < point.epochs < point.profile.interval.high
    # Held away from there the fit is worse, on either side.
    sums = np.array(point.profile.objectives)
    assert sums[0] > point.profile.threshold < sums[-1]
    assert point.loss == pytest.approx(
        float(
            fit.law.loss(
                num_parameters=PLACE[0],
                num_tokens=point.epochs * PLACE[1],
                unique_tokens=PLACE[1],
            )
        )
    )


def test_runs_that_never_overfit_leave_the_minimum_open_and_say_so():
    runs = make_runs(1.6, 1e-3, 0, (3, 3, 4))
    assert count_beyond(TRUTH, runs) == 0
    fit = fit_law(runs, OverfittingLaw, held=HELD, starts=STARTS)
    laws = bootstrap(runs, fit, 20)
    found = analyze_best_epochs(fit, runs, laws, [PLACE])
    assert found.num_beyond == 0
    assert found.exponents is None
    assert found.points[0].interval.high == math.inf
    (sentence,) = found.warnings
    assert sentence.startswith("No run is beyond its minimum in epochs by this fit")
    assert "open above" in sentence


def test_losses_that_only_fall_have_no_minimum_either():
    runs = make_runs(30, 0.0, 0)
    only = ChinchillaLaw(*TRUTH.values()[:5])
    losses = only.loss(
        num_parameters=runs.num_parameters,
        num_tokens=runs.num_tokens,
        unique_tokens=runs.unique_tokens,
    )
    falling = Runs(runs.num_parameters, runs.num_tokens, runs.unique_tokens, losses)
    fit = fit_law(falling, OverfittingLaw, held=HELD, starts=STARTS)
    found = analyze_best_epochs(fit, falling, bootstrap(falling, fit, 5), [PLACE])
    assert found.num_beyond == 0
    assert found.share_reached == 0
    assert found.points[0].interval == (math.inf, math.inf)


def test_places_are_those_of_runs_that_repeat():
    runs = Runs(*np.array([[1e8, 1e8, 1.001e8, 2e8], [2e9, 1e9, 5e9, 4e9], [1e9] * 4, [3.0] * 4]))
    assert places_of(runs) == [(1e8, 1e9), (2e8, 1e9)]


def test_forms_without_a_minimum_have_no_best_epochs():
    runs = make_runs(30, 0.0, 0)
    fit = fit_law(runs, ChinchillaLaw, held=dict(list(HELD.items())[1:]))
    with pytest.raises(DataError, match=r"chinchilla has no best number of epochs.* overfitting"):
        analyze_best_epochs(fit, runs)


def test_a_penalty_that_was_held_has_no_profile_of_its_minimum():
    runs = make_runs(30, 0.01, 1)
    held = {**HELD, "overfitting_scale": 0.0233}
    fit = fit_law(runs, OverfittingLaw, held=held, starts=STARTS)
    with pytest.raises(DataError, match="needs a fit of overfitting_scale: do not hold it"):
        profile_best_epochs(runs, fit, *PLACE)
