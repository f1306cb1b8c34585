"""Student's intervals, and the degrees of freedom that errors have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from megatron_mdm.diffusion.intervals import (
    degrees_of_differences,
    degrees_of_sum,
    student_reach,
)


@pytest.mark.parametrize("degrees", [1, 4.9, 11, 63])
def test_the_reach_is_students_quantile_times_the_error(degrees):
    assert student_reach(0.3, degrees) == pytest.approx(0.3 * student.ppf(0.975, degrees))
    assert student_reach(0.3, degrees, 0.5) == pytest.approx(0.3 * student.ppf(0.75, degrees))


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
