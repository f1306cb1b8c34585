"""Forms with a minimum in epochs: their limits, the minimum against calculus and a grid, fits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.allocation import best_allocation, best_sizes
from megatron_mdm.studies.laws.coordinates import Coordinates
from megatron_mdm.studies.laws.fitting import fit_law
from megatron_mdm.studies.laws.forms import FORMS, ChinchillaLaw, DataConstrainedLaw
from megatron_mdm.studies.laws.overfitting import (
    DataConstrainedOverfittingLaw,
    Minimum,
    OverfittingLaw,
    PenalizedLaw,
)
from megatron_mdm.studies.laws.runs import Runs
from megatron_mdm.studies.laws.storage import LawFile, read_law, write_law

BASE = (400.0, 900.0, 1.7, 0.34, 0.31)
PLAIN = OverfittingLaw(*BASE, 0.0233, 1.0, 1.5)
WORN = DataConstrainedOverfittingLaw(*BASE, 12.0, 6.0, 0.0133, 1.1, 1.3)
LAWS = [PLAIN, WORN, DataConstrainedOverfittingLaw(*BASE, 3.0, math.inf, 0.02, 0.4, 0.3)]
# One epoch, several, and more unique tokens than are seen.
PLACES = {
    "num_parameters": np.array([1e7, 1e8, 2e9, 1e9]),
    "num_tokens": np.array([1e9, 4e10, 7e10, 1e9]),
    "unique_tokens": np.array([1e9, 1e9, 1e10, 3e9]),
}


def test_the_penalty_is_as_worked_by_hand():
    law = OverfittingLaw(
        400.0, 900.0, 1.7, 0.5, 0.25, overfitting_scale=0.1, overfitting_exponent=2.0
    )
    place = {"num_parameters": 1e4, "num_tokens": 1e8}
    # 4 + 9 + 1.7 as for Chinchilla; ten epochs of 1e7: 0.1 (1e4 / 1e7) (10^2 - 1).
    assert float(law.loss(**place, unique_tokens=1e7)) == pytest.approx(14.7 + 0.0099)
    assert float(law.loss(**place, unique_tokens=1e8)) == pytest.approx(14.7, rel=1e-14)
    assert float(law.loss(**place, unique_tokens=1e9)) == pytest.approx(14.7, rel=1e-14)


def test_without_a_penalty_they_are_the_forms_that_it_was_added_to():
    for base, form, reuses in (
        (ChinchillaLaw, OverfittingLaw, ()),
        (DataConstrainedLaw, DataConstrainedOverfittingLaw, (12.0, 6.0)),
    ):
        expected = base(*BASE, *reuses).loss(**PLACES)
        np.testing.assert_array_equal(form(*BASE, *reuses).loss(**PLACES), expected)
        nearly = form(*BASE, *reuses, 1e-12, 1.0, 1.0).loss(**PLACES)
        np.testing.assert_allclose(nearly, expected, rtol=1e-9)
    # And where nothing wears out, the penalty is all that repetition costs.
    endless = DataConstrainedOverfittingLaw(*BASE, math.inf, math.inf, *PLAIN.values()[5:])
    np.testing.assert_allclose(endless.loss(**PLACES), PLAIN.loss(**PLACES), rtol=1e-14)


@pytest.mark.parametrize("law", LAWS)
def test_the_minimum_is_where_the_derivative_is_zero_and_a_grid_is_lowest(law):
    for parameters, unique in ((1e8, 1e9), (1e9, 1e10), (3e7, 1e9)):
        place = {"num_parameters": parameters, "unique_tokens": unique}

        def losses(epochs, place=place):
            return law.loss(**place, num_tokens=np.asarray(epochs) * place["unique_tokens"])

        best = float(law.best_epochs(**place))
        assert best > 1.05
        below, at, above = losses([best * math.exp(-1e-3), best, best * math.exp(1e-3)])
        bend = (below + above - 2 * at) / 1e-6
        assert bend > 0
        # Zero against what the slope is a tenth of a logarithm away.
        assert abs(above - below) / 2e-3 < 1e-3 * 0.1 * bend
        grid = np.geomspace(1, 100 * best, 20_001)
        brute = grid[losses(grid).argmin()]
        assert math.log(brute / best) == pytest.approx(0, abs=math.log(100 * best) / 20_000)
        # One minimum: down to it, and up from it.
        falls = np.diff(losses(grid)) < 0
        assert (np.diff(falls.astype(int)) != 0).sum() == 1


def test_best_epochs_are_at_least_one_and_infinite_where_nothing_overfits():
    place = {"num_parameters": np.array([1e11, 1e8]), "unique_tokens": 1e8}
    assert PLAIN.best_epochs(**place)[0] == 1
    assert WORN.best_epochs(**place)[0] == 1
    for law in (ChinchillaLaw(*BASE), DataConstrainedLaw(*BASE, 12.0, 6.0), OverfittingLaw(*BASE)):
        assert np.isinf(law.best_epochs(**place)).all()
    assert np.isinf(DataConstrainedOverfittingLaw(*BASE).best_epochs(**place)).all()


@pytest.mark.parametrize("law", LAWS)
def test_the_exponents_are_the_slopes_of_best_epochs(law):
    n, u, step = 1e8, 1e9, 1e-4
    found = type(law).best_epochs_exponents(np.array(law.values()), n, u)

    def log_best(log_n: float, log_u: float) -> float:
        place = {"num_parameters": n * math.exp(log_n), "unique_tokens": u * math.exp(log_u)}
        return math.log(float(law.best_epochs(**place)))

    along_unique = (log_best(0, step) - log_best(0, -step)) / (2 * step)
    along_parameters = (log_best(step, 0) - log_best(-step, 0)) / (2 * step)
    np.testing.assert_allclose(found, [along_unique, -along_parameters], rtol=1e-5)


def test_the_published_exponents_are_those_of_one_power_of_parameters_per_token():
    law = OverfittingLaw(*BASE[:4], 0.3, 0.02, 1.03, 1.575)
    found = type(law).best_epochs_exponents(np.array(law.values()), 1e8, 1e9)
    # arXiv 2510.03280: epochs ~ U^0.39 / N^0.55.
    np.testing.assert_allclose(found, [0.39, 0.55], atol=0.005)


def test_planted_constants_are_found_again_from_the_default_starts(grid_of):
    runs = grid_of(PLAIN, (4, 3, 5))
    fit = fit_law(runs, OverfittingLaw)
    assert fit.objective < 1e-12
    np.testing.assert_allclose(fit.law.values(), PLAIN.values(), rtol=1e-3)


def test_ten_planted_constants_are_found_again_where_few_starts_are_given(grid_of):
    starts = {"token_reuse": [6.0, 60.0], "parameter_reuse": [10.0], "capacity_exponent": [0.7]}
    starts |= {"parameter_exponent": [0.25, 0.45], "token_exponent": [0.25, 0.45]}
    fit = fit_law(grid_of(WORN, (5, 3, 6)), DataConstrainedOverfittingLaw, starts=starts)
    assert fit.objective < 1e-12
    np.testing.assert_allclose(fit.law.values(), WORN.values(), rtol=1e-3)


@pytest.mark.parametrize("law", [PLAIN, WORN])
def test_a_minimum_that_is_held_stays_in_its_place(law, grid_of):
    fit = fit_law(
        grid_of(law, (4, 3, 5)), type(law), held=dict(zip(law.names()[:5], BASE, strict=True))
    )
    held = fit.coordinates.put_minimum(Minimum(2e8, 1e9, 7.0))
    assert "overfitting_scale" not in held.free
    moved = type(law).from_values(held.constants(held.of(law)))
    best = moved.best_epochs(num_parameters=2e8, unique_tokens=1e9)
    assert float(best) == pytest.approx(7.0, rel=1e-9)


def test_the_size_of_a_penalty_in_the_middle_of_the_runs_hardly_moves_with_its_exponents(grid_of):
    runs = grid_of(PLAIN, (4, 3, 5))
    quantities = (runs.num_parameters, runs.num_tokens, runs.unique_tokens)
    middles = OverfittingLaw.log_middles(*(float(np.log(one).mean()) for one in quantities))
    coordinates = Coordinates(OverfittingLaw, OverfittingLaw.names(), {}, False, middles)
    place = coordinates.of(PLAIN)
    back = coordinates.constants(place)
    np.testing.assert_allclose(back, PLAIN.values(), rtol=1e-12)
    n, u = (math.exp(float(np.log(one).mean())) for one in quantities[::2])
    term = {"num_parameters": n, "num_tokens": 10 * u, "unique_tokens": u}
    moved = place.copy()
    moved[-1] += 0.3  # delta by a third
    other = OverfittingLaw.from_values(coordinates.constants(moved))
    before, after = (
        float(law.loss(**term) - ChinchillaLaw(*BASE).loss(**term)) for law in (PLAIN, other)
    )
    assert after == pytest.approx(before, rel=0.05)


def test_a_budget_is_not_spent_on_overfitting():
    found = best_allocation(PLAIN, training_flops=1e22, unique_tokens=1e8)
    best = PLAIN.best_epochs(num_parameters=found.num_parameters, unique_tokens=1e8)
    assert found.epochs == pytest.approx(float(best))
    assert 6 * found.num_parameters * found.num_tokens < 1e22
    # A small budget is spent, and more of it never hurts.
    small = best_allocation(PLAIN, training_flops=1e17, unique_tokens=1e8)
    assert 6 * small.num_parameters * small.num_tokens == pytest.approx(1e17)
    for law in (PLAIN, WORN):
        _, losses = best_sizes([law], np.geomspace(1e16, 1e23, 30), 1e8)
        assert (np.diff(losses[0]) < 1e-9).all()


def test_a_law_file_holds_them_with_or_without_a_penalty(tmp_path):
    for law in (PLAIN, WORN, OverfittingLaw(*BASE), DataConstrainedOverfittingLaw(*BASE)):
        write_law(tmp_path / "law.json", LawFile(law))
        assert read_law(tmp_path / "law.json").law == law
    assert {"overfitting", "data_constrained_overfitting"} < set(FORMS.names)
    assert issubclass(FORMS.find("overfitting", "--form"), PenalizedLaw)


@pytest.mark.parametrize(
    ("shape", "held", "message"),
    [
        ((4, 3, 1), {}, "No run repeats its data .* so overfitting_scale cannot be known"),
        ((6, 4, 2), {}, "1 different numbers of epochs above one, too few to tell overfitting_exp"),
        ((2, 1, 6), {}, r"2 different sizes \(num_parameters\), too few"),
        ((1, 4, 6), {"parameter_scale": 1.0, "parameter_exponent": 0.3}, None),
    ],
)
def test_runs_that_cannot_tell_overfitting_are_refused(shape, held, message, grid_of):
    runs = grid_of(PLAIN, shape)
    if message is None:
        assert fit_law(runs, OverfittingLaw, held=held).objective < 1
        return
    with pytest.raises(DataError, match=message):
        fit_law(runs, OverfittingLaw, held=held)


def test_sizes_in_step_with_their_data_cannot_tell_capacity(grid_of):
    # N / U is one number at all runs that repeat; sizes and tokens vary with it.
    u = np.repeat(np.geomspace(1e8, 1e10, 5), 4)
    epochs = np.tile([1.0, 4.0, 16.0, 64.0], 5)
    losses = PLAIN.loss(num_parameters=u / 10, num_tokens=u * epochs, unique_tokens=u)
    runs = Runs(u / 10, u * epochs, u, losses)
    with pytest.raises(DataError, match="1 different parameters per unique token, too few to tell"):
        fit_law(runs, OverfittingLaw)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_penalty_that_is_no_number_cannot_be_held(value, grid_of):
    runs = grid_of(PLAIN, (4, 3, 5))
    with pytest.raises(DataError, match=r"overfitting_scale=.* is not valid: give a number"):
        fit_law(runs, OverfittingLaw, held={"overfitting_scale": value})
