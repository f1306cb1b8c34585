"""IsoFLOP parabolas and power laws against hand-worked cases and least squares in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, linregress, t

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.studies.laws.forms import ChinchillaLaw
from megatron_mdm.studies.laws.isoflop import analyze_isoflops
from megatron_mdm.studies.laws.power_law import fit_power_law
from megatron_mdm.studies.laws.runs import Runs


def runs_at(groups: dict[float, list[tuple[float, float]]]) -> Runs:
    """Runs at budgets: sizes and losses of each."""
    rows = [(n, c / (6 * n), loss) for c, pairs in groups.items() for n, loss in pairs]
    n, d, losses = np.array(rows).T
    return Runs(n, d, d, losses)


def parabola(best: float, lowest: float, sizes: list[float]) -> list[tuple[float, float]]:
    return [(n, lowest + 0.1 * math.log(n / best) ** 2) for n in sizes]


def test_parabolas_give_their_minima_and_these_a_power_law():
    # N = 1e6 (C / 1e15)^0.5, L = 4 (C / 1e15)^-0.05; three budgets, sizes from half to twice.
    groups = {}
    for factor in (1.0, 16.0, 256.0):
        best = 1e6 * math.sqrt(factor)
        sizes = [best / 2, best * 0.8, best, 2 * best]
        groups[1e15 * factor] = parabola(best, 4 * factor**-0.05, sizes)
    found = analyze_isoflops(runs_at(groups))
    assert [group.flops for group in found.groups] == pytest.approx([1e15, 1.6e16, 2.56e17])
    assert [group.best_parameters for group in found.groups] == pytest.approx([1e6, 4e6, 16e6])
    assert [group.best_loss for group in found.groups] == pytest.approx(
        [4.0, 4 * 16**-0.05, 4 * 256**-0.05]
    )
    assert [group.curvature for group in found.groups] == pytest.approx([0.1] * 3)
    assert found.size_law.exponent == pytest.approx(0.5)
    assert found.token_law.exponent == pytest.approx(0.5)
    assert found.loss_law.exponent == pytest.approx(-0.05)
    assert found.size_law.at(1e15) == pytest.approx(1e6)
    assert 6 * found.size_law.at(1e17) * found.token_law.at(1e17) == pytest.approx(1e17)
    assert not found.warnings()


def test_budgets_within_two_percent_are_one():
    sizes = [5e5, 1e6, 2e6]
    near = [(n, loss, 1 + 0.009 * index) for index, (n, loss) in
            enumerate(parabola(1e6, 3.0, sizes))]  # fmt: skip
    groups = {1e15 * factor: [(n, loss)] for n, loss, factor in near}
    (group,) = analyze_isoflops(runs_at(groups)).groups
    assert group.best_parameters == pytest.approx(1e6)
    apart = {1e15 * (1 + 3 * (factor - 1)): [(n, loss)] for n, loss, factor in near}
    with pytest.raises(DataError, match=r"At 1e\+15 FLOPs there are runs of 1 different sizes"):
        analyze_isoflops(runs_at(apart))


def test_three_runs_leave_no_interval_and_a_minimum_outside_is_said():
    found = analyze_isoflops(runs_at({1e15: parabola(1e6, 3.0, [2e6, 4e6, 8e6])}))
    (group,) = found.groups
    assert group.parameters_interval is None
    assert found.size_law is None
    assert group.extrapolates
    assert "At 1e+15 FLOPs the best size, 1e+06 parameters, lies outside" in found.warnings()[0]


def test_what_has_no_minimum_is_refused():
    two = [(1e6, 3.0), (2e6, 3.1), (2e6, 3.2)]
    with pytest.raises(DataError, match=r"2 different sizes, too few .* at least 3 sizes"):
        analyze_isoflops(runs_at({1e15: two}))
    hill = [(n, 6 - loss) for n, loss in parabola(1e6, 3.0, [5e5, 1e6, 2e6])]
    with pytest.raises(DataError, match=r"have no minimum .* opens downward"):
        analyze_isoflops(runs_at({1e15: hill}))


def test_the_minima_of_a_law_scale_as_its_exponents_say():
    """Near the optimum, N grows as C^(beta / (alpha + beta)): 0.34 and 0.28 give 0.4516."""
    law = ChinchillaLaw(406.4, 410.7, 1.69, 0.34, 0.28)
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    groups = {}
    for flops in (1e18, 1e19, 1e20):
        best = g * (flops / 6) ** (0.28 / 0.62)
        n = best * np.logspace(-0.15, 0.15, 5)
        losses = law.loss(num_parameters=n, num_tokens=flops / 6 / n, unique_tokens=n * 0 + 1e30)
        groups[flops] = list(zip(n.tolist(), losses.tolist(), strict=True))
    found = analyze_isoflops(runs_at(groups))
    assert found.size_law.exponent == pytest.approx(0.28 / 0.62, abs=1e-3)
    assert found.groups[0].best_parameters == pytest.approx(
        g * (1e18 / 6) ** (0.28 / 0.62), rel=0.01
    )


def test_intervals_of_the_minimum_cover_it_as_often_as_they_say():
    generator = np.random.default_rng(0)
    num_data_sets, covered = 200, 0
    for _ in range(num_data_sets):
        groups = {
            flops: [
                (n, loss + 0.005 * generator.standard_normal())
                for n, loss in parabola(1e6, 3.0, [3e5, 6e5, 1e6, 1.5e6, 3e6])
            ]
            for flops in (1e15, 1e16)
        }
        interval = analyze_isoflops(runs_at(groups)).groups[0].parameters_interval
        covered += interval.low <= 1e6 <= interval.high
    low, high = binom.ppf([0.0005, 0.9995], num_data_sets, CONFIDENCE)
    assert low <= covered <= high


def test_power_laws_have_the_intervals_of_a_line_through_logarithms():
    x = [1.0, 10.0, 100.0, 1000.0]
    y = [2.0, 21.0, 190.0, 2100.0]
    law = fit_power_law(x, y)
    line = linregress(np.log(x), np.log(y))
    assert law.exponent == pytest.approx(line.slope)
    assert law.scale == pytest.approx(math.exp(line.intercept))
    reach = t.ppf((1 + CONFIDENCE) / 2, 2) * line.stderr
    assert law.exponent_interval == pytest.approx((line.slope - reach, line.slope + reach))
    at_one = t.ppf((1 + CONFIDENCE) / 2, 2) * line.intercept_stderr
    assert law.interval_at(1.0).low == pytest.approx(math.exp(line.intercept - at_one))


def test_two_points_are_a_power_law_without_interval():
    law = fit_power_law([1.0, 4.0], [3.0, 6.0])
    assert law.exponent == pytest.approx(0.5)
    assert law.at(16) == pytest.approx(12)
    assert law.exponent_interval is None
    assert law.interval_at(2.0) is None
    with pytest.raises(DataError, match="two different points"):
        fit_power_law([2.0, 2.0], [3.0, 6.0])
    with pytest.raises(DataError, match="power law's y is -1"):
        fit_power_law([2.0, 3.0], [3.0, -1.0])
