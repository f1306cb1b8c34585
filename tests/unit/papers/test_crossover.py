"""Crossovers: the best of each, intervals, limits and trends on curves with known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as t_distribution

from megatron_mdm.config import ModelSize
from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.studies.papers.crossover import (
    Condition,
    MeasuredRun,
    compare,
    fit_limit,
    pool_seed_spread,
)
from megatron_mdm.studies.papers.crossover_report import (
    describe_comparison,
    describe_trend,
    write_crossover,
)
from megatron_mdm.studies.papers.crossover_runs import setting_of
from megatron_mdm.studies.papers.gap_trend import fit_gap_trend, fit_gap_trends
from megatron_mdm.studies.sweeps.grid import load_sweep

ROOT = Path(__file__).resolve().parents[3]
TWO = Condition("corpus/train", 100_000, 1_000_000)


def run(objective, losses, *, seed=0, setting="", condition=TWO, first_epoch=1.0, windows=None):
    epochs = first_epoch * 2.0 ** np.arange(len(losses))
    flops = 6.0 * condition.num_parameters * condition.unique_tokens * epochs
    losses = np.array(losses, dtype=float)
    records = [
        {
            "step": index + 1,
            "epoch": float(epoch),
            "consumed_flops_6nd": float(spent),
            NLL: float(loss),
            "valid/nll_standard_error": 0.01,
        }
        for index, (epoch, spent, loss) in enumerate(zip(epochs, flops, losses, strict=True))
    ]
    return MeasuredRun(
        f"{objective}-{seed}-{setting}",
        objective,
        condition,
        setting,
        seed,
        epochs,
        flops,
        losses,
        np.full(len(losses), 0.01),
        records,
        windows,
        # Embeddings are as much again.
        ModelSize(2.0 * condition.num_parameters, condition.num_parameters),
    )


def test_the_best_setting_is_the_one_whose_bests_are_least_on_average():
    runs = [
        # The lowest loss of all belongs to a setting that is worse on average.
        run("ar", [3.0, 2.0, 2.5], setting="a", seed=0),
        run("ar", [3.0, 2.6, 2.5], setting="a", seed=1),
        run("ar", [3.0, 2.1, 2.5], setting="b", seed=0),
        run("ar", [3.0, 2.2, 2.5], setting="b", seed=1),
        run("mdm", [4.0, 3.0, 2.4], seed=0),
        run("mdm", [4.0, 3.0, 2.6], seed=1),
    ]
    (found,) = compare(runs)
    assert (found.ar.setting, found.ar.num_settings) == ("b", 2)
    assert found.ar.loss == pytest.approx(2.15)
    assert found.mdm.loss == pytest.approx(2.5)
    assert found.gap == pytest.approx(0.35)


def test_seeds_are_pooled_into_intervals():
    ars = [
        run("ar", [2.0 + delta], setting=setting, seed=seed)
        for setting in "ab"
        for seed, delta in enumerate((0, 0.2))
    ]
    # Two pairs that differ by 0.2: variance 0.02 with two degrees of freedom.
    spread = pool_seed_spread(ars)
    assert (spread.deviation**2, spread.degrees) == (pytest.approx(0.02), 2)
    mdms = [run("mdm", [2.5, 2.4 + delta], seed=i) for i, delta in enumerate((0, 0.1))]
    (found,) = compare([*ars, *mdms])
    reach = t_distribution.ppf(0.975, 2) * math.sqrt(0.02 / 2)
    assert found.ar.interval == pytest.approx((2.1 - reach, 2.1 + reach))
    # Welch: variances 0.01 (2 degrees) and 0.005 / 2 (1 degree) of the means.
    variance = 0.01 + 0.0025
    degrees = variance**2 / (0.01**2 / 2 + 0.0025**2 / 1)
    reach = t_distribution.ppf(0.975, degrees) * math.sqrt(variance)
    assert found.interval == pytest.approx((0.35 - reach, 0.35 + reach))
    far = [run("mdm", [2.7, 2.6 + delta], seed=i) for i, delta in enumerate((0, 0.1))]
    assert "leave open" not in describe_comparison(compare([*ars, *far])[0])
    near = [run("mdm", [2.2, 2.1 + delta], seed=i) for i, delta in enumerate((0, 0.1))]
    assert "which the seeds leave open" in describe_comparison(compare([*ars, *near])[0])


def test_one_seed_has_no_interval():
    (found,) = compare([run("ar", [2.0]), run("mdm", [2.1, 1.9])])
    assert found.ar.interval is found.mdm.interval is found.interval is None
    assert "MDM is ahead by 0.100" in describe_comparison(found)


def test_the_crossing_is_where_the_best_so_far_of_mdm_reaches_that_of_ar():
    # AR overfits after 2.0. Between the epochs 4 and 8, equal in logarithm, MDM falls from 2.2 to
    # 1.8, so it meets 2.0 half-way: at 4 sqrt(2) epochs.
    (found,) = compare([run("ar", [2.5, 2.0, 2.4, 3.0]), run("mdm", [3.0, 2.6, 2.2, 1.8])])
    expected = 6 * TWO.num_parameters * TWO.unique_tokens * 4 * math.sqrt(2)
    assert found.critical.flops == pytest.approx(expected)
    assert found.critical_with_embeddings.flops == pytest.approx(2 * expected)
    assert "cross at" in describe_comparison(found)
    # Sizes of their own have embeddings of their own: AR's are as much again, MDM's thrice as much.
    # AR is level, so the crossing moves with MDM's count: half-way between 1 and 2 epochs.
    best_size = TWO._replace(num_parameters=None)
    ar, mdm = (
        run(kind, losses)._replace(condition=best_size)
        for kind, losses in (("ar", [2.0, 2.0]), ("mdm", [2.2, 1.8]))
    )
    mdm = mdm._replace(size=ModelSize(4.0, 1.0))
    (other,) = compare([ar, mdm])
    unit = 6 * TWO.num_parameters * TWO.unique_tokens
    assert other.critical.flops == pytest.approx(unit * math.sqrt(2))
    assert other.critical_with_embeddings.flops == pytest.approx(4 * unit * math.sqrt(2))
    (never,) = compare([run("ar", [2.5, 2.0, 2.4]), run("mdm", [3.0, 2.6, 2.2])])
    assert never.critical.verdict == "never"
    assert "do not cross" in describe_comparison(never)


@pytest.mark.parametrize(("limit", "crosses"), [(2.1, False), (1.9, True)])
def test_a_curve_that_levels_off_has_its_limit_and_crossing(limit, crosses):
    one = run("mdm", limit + 0.8 * (2.0 ** np.arange(12)) ** -0.4)
    found = fit_limit(one, 2.0)
    assert found.loss == pytest.approx(limit, abs=1e-4)
    if not crosses:
        assert found.crossing_flops is None
    else:
        # 0.8 x^-0.4 = 0.1 at x = 8^2.5 epochs.
        expected = one.flops[0] * 8**2.5
        assert found.crossing_flops == pytest.approx(expected, rel=1e-3)
    assert found.excludes(2.0)
    assert fit_limit(run("mdm", [3.0, 2.5, 2.2]), 2.0) is None


def test_a_curve_that_has_not_levelled_off_leaves_its_limit_open():
    noise = np.random.default_rng(0).normal(0, 0.004, 12)
    found = fit_limit(run("mdm", 4.0 - 0.1 * np.arange(12) + noise), 2.0)
    assert not found.excludes(2.0)


def test_conditions_are_compared_apart_and_incomplete_ones_left_out():
    other = TWO._replace(unique_tokens=200_000)
    runs = [run("ar", [2.0]), run("mdm", [2.3]), run("ar", [1.8], condition=other)]
    assert [one.condition for one in compare(runs)] == [TWO]
    runs.append(run("mdm", [1.9], condition=other))
    assert [one.gap for one in compare(runs)] == pytest.approx([0.3, 0.1])
    with pytest.raises(DataError, match="has runs of both AR and MDM"):
        compare(runs[:1])
    with pytest.raises(DataError, match="share no seed"):
        compare([run("ar", [2.0], seed=0), run("mdm", [2.0], seed=1)])


def test_a_trend_finds_where_the_gap_closes():
    # 0.3 at 1e5, less 0.05 for each doubling: zero after six doublings, at 6.4e6.
    points = [(1e5 * 2**k, 0.3 - 0.05 * k) for k in range(4)]
    trend = fit_gap_trend("unique_tokens", "here", points)
    assert trend.meeting == pytest.approx(6.4e6)
    assert trend.line.slope * math.log(2) == pytest.approx(-0.05)
    low, high = trend.meeting_interval
    assert low == pytest.approx(6.4e6, rel=1e-3)
    assert high == pytest.approx(6.4e6, rel=1e-3)
    assert "an extrapolation" in describe_trend(trend)


def test_the_interval_of_the_meeting_point_covers_it():
    rng = np.random.default_rng(0)
    x = 1e5 * 2.0 ** np.arange(6)
    covered = known = 0
    for _ in range(300):
        gaps = 0.2 - 0.1 * np.arange(6) + rng.normal(0, 0.05, 6)
        ends = fit_gap_trend("unique_tokens", "", list(zip(x, gaps, strict=True))).meeting_interval
        known += ends is not None
        covered += ends is not None and ends[0] <= 4e5 <= ends[1]
    assert known > 290
    # 90% of 300, and four standard errors of a binomial.
    assert abs(covered / known - 0.9) < 4 * math.sqrt(0.09 / known)


def test_a_flat_trend_says_that_it_knows_nothing():
    gaps = [0.1, 0.12, 0.09, 0.11]
    points = [(1e5 * 2**k, gap) for k, gap in enumerate(gaps)]
    trend = fit_gap_trend("unique_tokens", "here", points)
    assert trend.meeting_interval is None
    assert "do not say" in describe_trend(trend)
    two = fit_gap_trend("unique_tokens", "here", points[:2])
    assert two.line.slope_interval is None
    assert "no interval" in describe_trend(two)
    with pytest.raises(DataError, match="two different values"):
        fit_gap_trend("unique_tokens", "here", points[:1])


def test_trends_hold_everything_else_fixed():
    conditions = [TWO, TWO._replace(unique_tokens=2 * 10**5), TWO._replace(num_parameters=10**5)]
    runs = [
        run(kind, [loss], condition=condition)
        for condition in conditions
        for kind, loss in (("ar", 2.0), ("mdm", 2.2))
    ]
    found = fit_gap_trends(compare(runs))
    assert [(trend.variable, len(trend.points)) for trend in found] == [
        ("unique_tokens", 2),
        ("num_parameters", 2),
    ]


def test_the_shipped_sweeps_load(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Contests have a base too, and a test of their own (test_contest.py).
    paths = sorted(
        path
        for path in Path("configs").rglob("*.yaml")
        if "base:" in path.read_text() and path.parent.name != "fair_fight"
    )
    assert len(paths) >= 7
    for path in paths:
        sweep = load_sweep(path)
        settings = {setting_of(sweep, one) for one in sweep.runs}
        assert not any("seed" in setting or "unique" in setting for setting in settings)


def test_the_page_and_the_picture_are_whole(tmp_path):
    small = TWO._replace(unique_tokens=50_000)
    runs = [
        run(kind, losses, seed=seed, condition=condition)
        for condition in (TWO, small)
        for seed in (0, 1)
        for kind, losses in (("ar", [2.5, 2.0 + 0.01 * seed, 2.4]), ("mdm", [3.0, 2.4, 2.1]))
    ]
    comparisons = compare(runs)
    page, picture = write_crossover(
        tmp_path, comparisons, fit_gap_trends(comparisons), ["mdm_late"]
    )
    text = page.read_text()
    assert text.count("<svg") == 5
    assert "mdm_late" in text
    assert "50,000 unique tokens" in text
    # Both counts of N, and of the FLOPs of the last point: 6 N D, and twice as much.
    assert "<td>2,000,000</td><td>1,000,000</td>" in text
    assert "<th>FLOPs with</th><th>FLOPs without</th>" in text
    # 2.12 x 10^1.956 x 50,000^2.174 = 3.15e12 FLOPs, over and times 1.8.
    assert "1.75 \u00d7 10¹² to 5.66 \u00d7 10¹²" in text
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_gap_has_its_error_over_held_out_windows_where_all_runs_judged_the_same():
    def judged(kind, *losses):
        losses_N = np.array(losses)
        return JudgedWindows(
            3, "the same", np.arange(3), None if kind == "ar" else 0, 1, losses_N, losses_N
        )

    runs = [
        run("ar", [3.0, 2.0], seed=0, windows=judged("ar", 1.0, 2.0, 3.0)),
        run("ar", [3.0, 2.0], seed=1, windows=judged("ar", 1.0, 2.0, 3.0)),
        run("mdm", [3.0, 2.5], seed=0, windows=judged("mdm", 1.5, 2.4, 3.6)),
        run("mdm", [3.0, 2.5], seed=1, windows=judged("mdm", 1.5, 2.6, 3.4)),
    ]
    (found,) = compare(runs)
    # Mean differences of 0.5, 0.5 and 0.5 over seeds: no error is left.
    assert found.window_gap.mean == pytest.approx(found.gap) == pytest.approx(0.5)
    assert found.window_gap.standard_error == pytest.approx(0, abs=1e-12)
    assert (
        "Over held-out windows, paired, the gap's standard error is 0.0000"
        in describe_comparison(found)
    )
    elsewhere = replace(runs[3].best_windows, windows="others")
    (found,) = compare([*runs[:3], runs[3]._replace(best_windows=elsewhere)])
    assert found.window_gap is None
    (found,) = compare([*runs[:3], runs[3]._replace(best_windows=None)])
    assert found.window_gap is None
