"""Fits: planted constants, the published figures on public runs, and runs that tell too little."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.coordinates import Coordinates, descend
from megatron_mdm.studies.laws.fitting import fit_law, objective, r_squared, residuals
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw, GeometricLaw
from megatron_mdm.studies.laws.runs import Runs

PLANTED = {
    "chinchilla": ChinchillaLaw(400.0, 900.0, 1.7, 0.34, 0.31),
    "data_constrained": DataConstrainedLaw(400.0, 900.0, 1.7, 0.34, 0.31, 12.0, 6.0),
    # Another vocabulary, bytes, small models: nothing like the default starts.
    "small": DataConstrainedLaw(60.0, 8.0, 0.9, 0.5, 0.2, 40.0, 3.0),
    "geometric": GeometricLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.08, 0.2),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_constants_are_found_again_from_the_default_starts(name, grid_of):
    law = PLANTED[name]
    runs = grid_of(law)
    assert objective(law, runs) == pytest.approx(0.0, abs=1e-12)
    fit = fit_law(runs, type(law))
    assert fit.objective < 1e-9
    assert r_squared(fit.law, runs) == pytest.approx(1, abs=1e-6)
    for constant in law.names():
        assert getattr(fit.law, constant) == pytest.approx(getattr(law, constant), rel=0.02), (
            constant
        )


def test_outliers_hardly_move_a_fit(grid_of):
    law = PLANTED["chinchilla"]
    runs = grid_of(law, noise=1e-4)
    losses = runs.losses.copy()
    losses[::20] *= 2
    fit = fit_law(Runs(runs.num_parameters, runs.num_tokens, runs.unique_tokens, losses), type(law))
    assert fit.law.irreducible_loss == pytest.approx(1.7, rel=0.02)
    assert fit.law.parameter_exponent == pytest.approx(0.34, rel=0.02)


def test_tied_exponents_are_equal_and_found(grid_of):
    law = ChinchillaLaw(400.0, 900.0, 1.7, 0.33, 0.33)
    fit = fit_law(grid_of(law), ChinchillaLaw, tie_exponents=True)
    assert fit.law.parameter_exponent == fit.law.token_exponent == pytest.approx(0.33, rel=1e-3)
    other = fit_law(grid_of(PLANTED["chinchilla"]), ChinchillaLaw, tie_exponents=True)
    assert other.law.parameter_exponent == other.law.token_exponent
    assert other.objective > 1e-4  # exponents that differ cannot be fitted so


def test_a_single_line_is_fitted_as_by_hand():
    """Held exponents and E leave L - E = A / N + B / D, linear in A and B."""
    n = np.array([1.0, 2.0, 4.0])
    d = np.array([4.0, 2.0, 1.0])
    runs = Runs(n, d, d, 1 + 3 / n + 5 / d)
    held = {"irreducible_loss": 1.0, "parameter_exponent": 1.0, "token_exponent": 1.0}
    fit = fit_law(runs, ChinchillaLaw, held=held)
    assert fit.law.parameter_scale == pytest.approx(3, rel=1e-6)
    assert fit.law.token_scale == pytest.approx(5, rel=1e-6)
    assert fit.fitted == ("parameter_scale", "token_scale")


def test_descent_finds_the_median_of_logarithms():
    """One constant and residuals far beyond the width: absolute values, so a median."""
    tiny = {"parameter_scale": 1e-9, "token_scale": 1e-9}
    held = tiny | {"parameter_exponent": 1.0, "token_exponent": 1.0}
    coordinates = Coordinates(ChinchillaLaw, ("irreducible_loss",), held, False, {})

    def lowest(losses: list[float], start: float) -> tuple[float, float]:
        ones = np.ones(len(losses))
        runs = Runs(ones, ones, ones, np.array(losses))
        (free,), found = descend(coordinates, np.log([start]), runs)
        return float(np.exp(free)), found

    distances = np.abs(np.log([2.0, 3.0, 8.0, 100.0]) - np.log(5.0))
    for start in (0.1, 4.0):
        median, found = lowest([2.0, 3.0, 5.0, 8.0, 100.0], start)
        assert median == pytest.approx(5, rel=1e-3)
        assert found == pytest.approx(float(1e-3 * (distances - 5e-4).sum()), rel=1e-4)
        # Counted twice, the two lowest move it to the second of them.
        assert lowest([2.0, 2.0, 3.0, 3.0, 5.0, 8.0, 100.0], start)[0] == pytest.approx(3, rel=1e-3)


def test_the_published_fit_has_its_published_objective_and_is_a_minimum(public_runs, published):
    assert len(public_runs) == 182
    printed = [f"{value:.2f}" for value in published.values()[:3]]
    assert printed == ["520.82", "1487.72", "1.87"]
    assert f"{objective(published, public_runs):.7f}" == "0.0158259"
    held = dict(zip(published.names()[:5], published.values(), strict=False))
    starts = {"token_reuse": [14.0], "parameter_reuse": [5.0]}
    fit = fit_law(public_runs, DataConstrainedLaw, held=held, starts=starts)
    assert fit.law.token_reuse == pytest.approx(published.token_reuse, rel=2e-3)
    assert fit.law.parameter_reuse == pytest.approx(published.parameter_reuse, rel=2e-3)
    assert objective(published, public_runs) * (1 - 1e-5) < fit.objective
    assert fit.objective <= objective(published, public_runs)


def test_from_the_default_starts_the_public_runs_have_lower_minima(public_runs, published):
    held = dict(zip(published.names()[:5], published.values(), strict=False))
    fit = fit_law(public_runs, DataConstrainedLaw, held=held)
    assert fit.law.token_reuse == pytest.approx(95.4, rel=0.01)
    assert fit.objective == pytest.approx(0.0158047, abs=1e-7)
    # The published one is among the others.
    nearest = min(fit.others, key=lambda law: abs(law.token_reuse - published.token_reuse))
    assert nearest.token_reuse == pytest.approx(published.token_reuse, rel=2e-3)


def test_all_seven_constants_fit_the_public_runs_far_better(public_runs, published):
    fit = fit_law(public_runs, DataConstrainedLaw)
    assert fit.objective < 0.42 * objective(published, public_runs)
    assert fit.at_limits == ("parameter_reuse",)
    assert np.median(np.abs(residuals(fit.law, public_runs))) < 0.03


def test_too_few_runs_are_refused(grid_of):
    runs = grid_of(PLANTED["data_constrained"])
    few = Runs(runs.num_parameters[:7], *(one[:7] for one in (runs.num_tokens, runs.unique_tokens)),
               runs.losses[:7])  # fmt: skip
    with pytest.raises(DataError, match="7 runs are too few to fit 7 constants: give at least 8"):
        fit_law(few, DataConstrainedLaw)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 5), r"1 different sizes \(num_parameters\), too few to tell parameter_scale and"),
        ((2, 5, 5), r"2 different sizes .* vary N over at least 3 values"),
        ((40, 1, 1), r"1 different numbers of tokens .* vary D over at least 3"),
        ((6, 6, 1), r"No run repeats its data .* so token_reuse cannot be known"),
    ],
)
def test_degenerate_grids_are_refused(shape, message, grid_of):
    law = PLANTED["data_constrained"]
    with pytest.raises(DataError, match=message):
        fit_law(grid_of(law, shape), DataConstrainedLaw)


def test_what_is_held_need_not_vary(grid_of):
    law = PLANTED["data_constrained"]
    held = {name: getattr(law, name) for name in law.names() if name != "token_reuse"}
    fit = fit_law(grid_of(law, (1, 1, 6)), DataConstrainedLaw, held=held)
    assert fit.law.token_reuse == pytest.approx(12, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held": {"token_reuse": 3.0}}, "token_reuse is no constant of the form chinchilla"),
        ({"held": {"token_scale": -3.0}}, "token_scale=-3.0 is not valid"),
        ({"held": {"token_exponent": 0.3}, "tie_exponents": True}, "cannot be held"),
        ({"held": dict.fromkeys(ChinchillaLaw.names(), 1.0)}, "No constant is left to fit"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, message, grid_of):
    with pytest.raises(DataError, match=message):
        fit_law(grid_of(PLANTED["chinchilla"]), ChinchillaLaw, **arguments)
