"""Forms by held-out runs: the true one wins, and what cannot be told apart is said."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import student_interval
from megatron_mdm.studies.laws.comparison import compare_forms
from megatron_mdm.studies.laws.fitting import fit_law
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw, Law
from megatron_mdm.studies.laws.overfitting import OverfittingLaw
from megatron_mdm.studies.laws.runs import Runs

BASE = (400.0, 900.0, 1.7, 0.34, 0.31)
OVERFITS = OverfittingLaw(*BASE, 0.0233, 1.0, 1.5)
FRESH = ChinchillaLaw(*BASE)
# Exponents and E are known, so that a fit takes tenths of a second.
HELD = {"irreducible_loss": 1.7, "parameter_exponent": 0.34, "token_exponent": 0.31}


def make_runs(law: Law, shape: tuple[int, int, int] = (4, 3, 4), noise: float = 0.003) -> Runs:
    sizes, unique = np.geomspace(5e7, 8e8, shape[0]), np.geomspace(3e8, 3e9, shape[1])
    axes = np.meshgrid(sizes, unique, np.geomspace(1, 20, shape[2]), indexing="ij")
    n, u, e = (axis.flatten() for axis in axes)
    losses = law.loss(num_parameters=n, num_tokens=u * e, unique_tokens=u)
    errors = np.random.default_rng(0).standard_normal(len(n))
    return Runs(n, u * e, u, losses * np.exp(noise * errors))


@pytest.mark.parametrize("held_out", ["largest", "pairs"])
def test_the_true_form_predicts_best(held_out):
    runs = make_runs(OVERFITS)
    found = compare_forms(runs, [ChinchillaLaw, OverfittingLaw], held_out, held=HELD)
    best, other = found.forms
    assert (best.form, other.form) == ("overfitting", "chinchilla")
    assert best.mean_error < 0.05 < other.mean_error
    assert other.is_worse
    assert not best.is_worse
    assert found.verdict.endswith("best; worse than it: chinchilla")
    # The differences are run by run, and their error over the places.
    worse = np.abs(other.errors) - np.abs(best.errors)
    assert other.difference.mean == pytest.approx(worse.mean())
    ends = student_interval(worse.mean(), other.difference.clustered_error, found.num_places - 1)
    assert other.interval == ends
    assert other.ratio == pytest.approx(
        np.exp(np.log(np.abs(other.errors / best.errors)).mean()), rel=1e-6
    )
    expected = 10 if held_out == "largest" else len(runs)
    assert len(found.rows) == len(best.errors) == expected
    assert len(set(found.rows)) == expected


def test_the_largest_runs_are_predicted_from_a_fit_to_the_others():
    runs = make_runs(FRESH)
    found = compare_forms(runs, [ChinchillaLaw, OverfittingLaw], held=HELD)
    rest = np.setdiff1d(np.arange(len(runs)), found.rows)
    assert runs.flops[rest].max() <= runs.flops[found.rows].min()
    law = fit_law(runs.take(rest), ChinchillaLaw, held=HELD).law
    errors = next(one.errors for one in found.forms if one.form == "chinchilla")
    held = runs.take(found.rows)
    np.testing.assert_allclose(errors, held.losses_of(law) - held.losses, atol=1e-9)


def test_a_constant_that_does_nothing_is_not_told_from_none():
    runs = make_runs(FRESH)
    held = {**HELD, "parameter_reuse": np.inf}
    found = compare_forms(runs, [ChinchillaLaw, DataConstrainedLaw], "pairs", held=held)
    assert not any(one.is_worse for one in found.forms)
    assert "not told from it by these 48 runs: " in found.verdict
    # More constants fit no worse where all are fitted.
    fitted = {one.form: one for one in found.forms}
    assert fitted["data_constrained"].num_constants == 3
    assert fitted["data_constrained"].fitted_error < 1.05 * fitted["chinchilla"].fitted_error


def test_places_that_are_left_out_must_leave_enough():
    runs = make_runs(FRESH, (3, 1, 3))
    with pytest.raises(DataError, match=r"Without the 3 runs that are held out chinchilla cannot"):
        compare_forms(runs, [ChinchillaLaw, OverfittingLaw], "pairs")
    one = Runs(*(np.full(9, value) for value in (1e8, 2e9, 1e9, 3.0)))
    with pytest.raises(DataError, match="leaving them out leaves nothing"):
        compare_forms(one, [ChinchillaLaw, OverfittingLaw], "pairs")


@pytest.mark.parametrize("forms", [[ChinchillaLaw], [ChinchillaLaw, ChinchillaLaw]])
def test_one_form_cannot_be_compared(forms):
    with pytest.raises(DataError, match="at least two different forms"):
        compare_forms(make_runs(FRESH), forms)
