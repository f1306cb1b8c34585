"""Forms of laws against hand-worked numbers, and allocations against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.allocation import best_allocation
from megatron_mdm.studies.laws.fitting import fit_law
from megatron_mdm.studies.laws.forms import (
    FORMS,
    ChinchillaLaw,
    DataConstrainedLaw,
    GeometricLaw,
    Law,
    predicted_losses,
)
from megatron_mdm.studies.laws.storage import LawFile, read_law, write_law


def loss_of(law: Law, parameters: float, tokens: float, unique: float) -> float:
    found = law.loss(num_parameters=parameters, num_tokens=tokens, unique_tokens=unique)
    return float(found)


@pytest.mark.parametrize("form", [ChinchillaLaw, DataConstrainedLaw, GeometricLaw])
def test_without_limits_to_reuse_every_form_is_the_law_of_chinchilla(form):
    law = form(400.0, 900.0, 1.7, 0.5, 0.25)
    # 400 / 1e4^0.5 = 4 and 900 / 1e8^0.25 = 9; more unique tokens than are seen change nothing.
    assert loss_of(law, 1e4, 1e8, 1e8) == pytest.approx(14.7)
    assert loss_of(law, 1e4, 1e8, 1e9) == pytest.approx(14.7)
    # Nor do fewer, if repetition is worth as much as what is new.
    assert loss_of(law, 1e4, 1e8, 1e5) == pytest.approx(14.7)


def test_repetition_wears_out():
    # Both terms are 1 / sqrt: G = 1, so N*(U) = U.
    law = DataConstrainedLaw(1.0, 1.0, 1.0, 0.5, 0.5, token_reuse=2.0, parameter_reuse=3.0)
    # Five epochs of 100: 100 + 200 (1 - exp(-4 / 2)). As many parameters as unique tokens.
    tokens = 100 + 200 * (1 - math.exp(-2))
    assert loss_of(law, 100, 500, 100) == pytest.approx(1 + 0.1 + tokens**-0.5)
    # Seven times the useful parameters: 100 + 300 (1 - exp(-6 / 3)).
    parameters = 100 + 300 * (1 - math.exp(-2))
    assert loss_of(law, 700, 500, 100) == pytest.approx(1 + parameters**-0.5 + tokens**-0.5)
    # For ever, it is worth 2 more epochs.
    assert loss_of(law, 100, 1e9, 100) == pytest.approx(1 + 0.1 + 300**-0.5)


def test_each_pass_is_worth_a_share_of_the_one_before():
    law = GeometricLaw(1.0, 1.0, 1.0, 0.5, 0.5, token_decay=0.25, parameter_decay=0.5)
    # The example of arXiv 2305.16264, appendix A: five passes that keep 75% each are worth 3.05.
    passes = 1 + 0.75 + 0.75**2 + 0.75**3 + 0.75**4
    assert passes == pytest.approx(3.05, abs=0.005)
    five = np.array([5.0])
    assert law.effective_epochs(five).item() == pytest.approx(passes)
    assert loss_of(law, 100, 500, 100) == pytest.approx(1 + 0.1 + (100 * passes) ** -0.5)
    # Three times the useful parameters: 1 + 0.5 + 0.25.
    assert loss_of(law, 300, 100, 100) == pytest.approx(1 + 175**-0.5 + 0.1)
    # Its approximation, R = (1 - 0.25) / 0.25 = 3, is worth 3.21 there.
    other = DataConstrainedLaw(1.0, 1.0, 1.0, 0.5, 0.5, token_reuse=3.0)
    assert other.effective_epochs(five).item() == pytest.approx(3.21, abs=0.005)


@pytest.mark.parametrize(
    "law",
    [
        ChinchillaLaw(400.0, 900.0, 1.7, 0.34, 0.31),
        DataConstrainedLaw(400.0, 900.0, 1.7, 0.34, 0.31, 12.0, 6.0),
        DataConstrainedLaw(400.0, 900.0, 1.7, 0.34, 0.31, math.inf, 6.0),
        GeometricLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.1, 0.3),
    ],
)
def test_many_laws_at_once_expect_what_each_expects_alone(law):
    # No repetition, some, and beyond the useful parameters.
    n, d, u = np.array([[1e8, 1e8, 1e12], [1e9, 1e11, 1e11], [1e9, 1e9, 1e8]])
    alone = law.loss(num_parameters=n, num_tokens=d, unique_tokens=u)
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(predicted_losses([law] * 4, n, d, u), np.tile(alone, (4, 1)))


def test_the_best_allocation_is_that_of_the_closed_form():
    law = ChinchillaLaw(406.4, 410.7, 1.69, 0.34, 0.28)
    # arXiv 2203.15556, section 3.3: N = G (C / 6)^(beta / (alpha + beta)).
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    size = g * (1e21 / 6) ** (0.28 / 0.62)
    found = best_allocation(law, training_flops=1e21, unique_tokens=1e30)
    assert found.num_parameters == pytest.approx(size, rel=1e-5)
    assert 6 * found.num_parameters * found.num_tokens == pytest.approx(1e21)
    assert found.loss == pytest.approx(
        1.69 + 406.4 / size**0.34 + 410.7 / (1e21 / 6 / size) ** 0.28
    )


def test_repetition_moves_the_best_allocation_as_worked_by_hand():
    # Parameters do not wear out, tokens do at once: D' = U for any number of epochs, so the best
    # is the largest model that sees all of U once: N = C / (6 U).
    law = GeometricLaw(1.0, 1.0, 1.0, 0.5, 0.5, token_decay=1.0)
    found = best_allocation(law, training_flops=6e10, unique_tokens=1e3)
    assert found.num_parameters == pytest.approx(1e7, rel=1e-5)
    assert found.epochs == pytest.approx(1, rel=1e-5)
    assert found.loss == pytest.approx(1 + 1e7**-0.5 + 1e3**-0.5)


OWN_FORM = """
from dataclasses import dataclass

import numpy as np

from megatron_mdm.studies.laws.forms import Law, constant


@dataclass(frozen=True)
class PowerReuse(Law):
    reuse_names = ("token_power", "parameter_power")

    token_power: float = constant("p", 1e-3, 1.0, starts=(0.2, 0.7), default=1.0)
    parameter_power: float = constant("q", 1e-3, 1.0, starts=(0.2, 0.7), default=1.0)

    @classmethod
    def _log_worth(cls, log_epochs, reuse):
        return reuse * log_epochs
"""


def test_a_form_from_outside_the_package_is_fitted_and_read_again(tmp_path, monkeypatch, grid_of):
    (tmp_path / "own_form.py").write_text(OWN_FORM)
    monkeypatch.syspath_prepend(tmp_path)
    form = FORMS.find("own_form:PowerReuse", "--form")
    law = form(400.0, 900.0, 1.7, 0.34, 0.31, token_power=0.6, parameter_power=0.8)
    # Sixteen epochs are worth 16^0.6.
    assert law.effective_epochs(np.array([16.0]))[0] == pytest.approx(16**0.6)
    held = {name: getattr(law, name) for name in law.names()[:5]}
    fit = fit_law(grid_of(law), form, held=held)
    assert (fit.law.token_power, fit.law.parameter_power) == pytest.approx((0.6, 0.8), rel=1e-3)
    write_law(tmp_path / "law.json", LawFile(fit.law))
    assert read_law(tmp_path / "law.json").law == fit.law


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_budgets_have_to_be_numbers(bad):
    law = ChinchillaLaw(400.0, 900.0, 1.7, 0.34, 0.31)
    with pytest.raises(DataError, match="training_flops="):
        best_allocation(law, training_flops=bad, unique_tokens=1e9)
    with pytest.raises(DataError, match="unique_tokens="):
        best_allocation(law, training_flops=1e20, unique_tokens=bad)
    with pytest.raises(TypeError):
        best_allocation(law, 1e20, 1e9)  # flops and tokens cannot be mixed up by their order
