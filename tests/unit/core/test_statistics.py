"""Means, errors, degrees of freedom and intervals against closed forms and known libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import linregress
from scipy.stats import t as student

from megatron_mdm.core.statistics import (
    Interval,
    clustered_mean,
    degrees_of_differences,
    degrees_of_mean,
    degrees_of_sum,
    fit_line,
    mean_with_standard_error,
    percentile_band,
    percentile_interval,
    student_reach,
    wilson_interval,
)


@pytest.mark.parametrize("degrees", [1, 4.9, 11, 63])
def test_the_reach_is_students_quantile_times_the_error(degrees):
    assert student_reach(0.3, degrees) == pytest.approx(0.3 * student.ppf(0.975, degrees))


def test_a_known_error_has_the_normal_quantile_and_none_no_reach():
    assert student_reach(1.0, math.inf) == pytest.approx(1.959964, rel=1e-6)
    assert student_reach(0.0, math.inf) == student_reach(0.0, 3) == 0.0
    assert math.isnan(student_reach(math.nan, 0))
    assert math.isnan(student_reach(math.nan, 5))


@pytest.mark.parametrize("count", [2, 3, 8, 64])
def test_degrees_of_differences_have_the_mean_and_variance_of_their_sum_of_squares(count):
    """Of a form x'Ax in independent normal x the mean is tr A and the variance 2 tr A^2."""
    differences = np.diff(np.eye(count), axis=0)
    form = differences.T @ differences
    expected = np.trace(form) ** 2 / np.trace(form @ form)
    assert degrees_of_differences(count) == pytest.approx(expected)


def test_errors_of_a_sum_share_their_degrees():
    assert degrees_of_sum([0.2] * 5, [7] * 5) == pytest.approx(35)
    assert degrees_of_sum([3.0, 1e-6], [7, 100]) == pytest.approx(7)
    # By hand: (9 + 16)^2 / (81 / 3 + 256 / 8).
    assert degrees_of_sum([3.0, 4.0], [3, 8]) == pytest.approx(625 / 59)
    # What is exact adds nothing.
    assert degrees_of_sum([3.0, 0.0], [7, math.inf]) == pytest.approx(7)
    assert degrees_of_sum([0.0, 0.0], [math.inf, 4]) == math.inf
    assert degrees_of_sum([], []) == math.inf


def test_each_fitted_coefficient_takes_a_degree_of_freedom():
    assert [degrees_of_mean(count) for count in (1, 12, 40)] == [0, 11, 39]
    assert [degrees_of_mean(count, is_stratified=True) for count in (15, 16)] == [14, 12]


def test_mean_and_standard_error_are_those_of_the_textbook():
    mean, error = mean_with_standard_error(np.array([1.0, 2.0, 6.0]))
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(7 / 3)))


def test_the_error_of_clusters_is_the_spread_of_means_over_documents():
    """Documents with something in common, 400 times over: the plain error is far too small."""
    generator = np.random.default_rng(3)
    documents_N = np.repeat(np.arange(12), 8)
    found = []
    for _ in range(400):
        values_N = generator.normal(0, 1, 12)[documents_N] + generator.normal(0, 0.5, 96)
        found.append(clustered_mean(values_N, documents_N))
    spread = np.std([one.mean for one in found])
    assert np.mean([one.clustered_error for one in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([one.standard_error for one in found]) < 0.5 * spread


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (3, 10), (700, 1319)])
def test_wilsons_interval_holds_the_shares_that_the_sample_does_not_refute(right, total):
    # Its ends are where the normal test of a share just rejects: |p - s| = z sqrt(s(1 - s)/n).
    for end in wilson_interval(right, total):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / total)
            assert abs(right / total - end) == pytest.approx(1.959964 * error, rel=1e-5, abs=1e-7)
        else:
            assert right in (0, total)


def test_intervals_in_words():
    assert Interval(3.0, 7.5).describe() == "3 to 7.5"
    assert Interval(0.0, 7.5).describe() == "below 7.5"
    assert Interval(3.0, math.inf).describe() == "above 3"
    assert Interval(0.0, math.inf).describe() == "no end found"


def test_percentiles_by_hand():
    assert percentile_interval(range(1001)) == pytest.approx((25, 975))
    assert percentile_interval([1.0, 2.0]) == pytest.approx((1.025, 1.975))
    # Infinite values are values beyond all others; between them and others is no middle.
    assert percentile_interval([1.0] * 50 + [math.inf] * 50) == (1, math.inf)
    assert percentile_interval([0.0, 1.0, math.inf]).high == math.inf
    # Of 201 values the ends are the sixth from either side.
    assert percentile_interval([1.0] * 196 + [math.inf] * 5).high == 1.0
    assert percentile_interval([1.0] * 195 + [math.inf] * 6).high == math.inf


def test_a_band_has_the_interval_of_each_column():
    values = np.random.default_rng(0).normal(size=(60, 3))
    for column, ends in zip(values.T, percentile_band(values).T, strict=True):
        assert percentile_interval(column) == pytest.approx(tuple(ends))


def test_a_line_has_the_intervals_of_least_squares():
    x, y = np.array([0.0, 1.0, 2.0, 4.0]), np.array([2.0, 2.6, 4.4, 7.0])
    line, known = fit_line(x, y), linregress(x, y)
    assert (line.slope, line.at(0.0)) == pytest.approx((known.slope, known.intercept))
    reach = student.ppf(0.975, 2) * known.stderr
    assert line.slope_interval == pytest.approx((known.slope - reach, known.slope + reach))
    at_zero = student.ppf(0.975, 2) * known.intercept_stderr
    assert line.interval_at(0.0) == pytest.approx(
        (known.intercept - at_zero, known.intercept + at_zero)
    )


def test_a_line_through_two_points_has_no_interval():
    line = fit_line([1.0, 3.0], [2.0, 8.0])
    assert (line.slope, line.at(2.0)) == (3.0, 5.0)
    assert line.slope_interval is None
    assert line.interval_at(2.0) is None
