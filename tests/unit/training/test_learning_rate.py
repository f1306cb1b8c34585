from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config.schedule import CHOSEN_SCHEDULE

PEAK, LEAST = 1e-2, 1e-3
RATES = {"lr": PEAK, "min_lr": LEAST}


def num_warmup_steps(**schedule):
    return CHOSEN_SCHEDULE.read({"steps": 1000, **schedule}).num_warmup_steps(1000)


def rates(num_steps, **schedule):
    section = CHOSEN_SCHEDULE.read({"steps": num_steps, **schedule})
    return [section.rate(step, num_steps, **RATES) for step in range(num_steps)]


def test_warm_up_rises_in_equal_parts_and_reaches_the_peak_at_its_last_step():
    for kind in ("cosine", "constant", "wsd"):
        found = rates(20, kind=kind, warmup_steps=4)
        assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK], rel=1e-15)


def test_cosine_without_warm_up_has_its_closed_form():
    # Angles of 60, 120 and 180 degrees: cosines 1/2, -1/2 and -1.
    span = PEAK - LEAST
    expected = [LEAST + 0.75 * span, LEAST + 0.25 * span, LEAST]
    assert rates(3, kind="cosine", warmup_steps=0) == pytest.approx(expected, rel=1e-14)


def test_cosine_is_halfway_down_half_a_turn_after_warm_up():
    found = rates(14, kind="cosine", warmup_steps=4)
    assert found[3 + 5] == pytest.approx((PEAK + LEAST) / 2, rel=1e-14)
    assert found[3 + 10] == pytest.approx(LEAST, rel=1e-14)


def test_constant_stays_at_the_peak_to_the_end():
    assert rates(10, kind="constant", warmup_steps=2)[1:] == [PEAK] * 9


def test_wsd_holds_the_peak_then_falls_in_a_line_to_min_lr():
    found = rates(10, kind="wsd", warmup_steps=2, decay_fraction=0.4)
    line = [LEAST + (PEAK - LEAST) * part for part in (1, 0.75, 0.5, 0.25, 0)]
    assert found[1:6] == pytest.approx([PEAK] * 5, rel=1e-14)
    assert found[5:] == pytest.approx(line, rel=1e-14)


def test_linear_falls_in_a_line_from_the_peak_to_min_lr():
    found = rates(6, kind="linear", warmup_steps=2)
    line = [PEAK, *(LEAST + (PEAK - LEAST) * part for part in (0.75, 0.5, 0.25)), LEAST]
    assert found == pytest.approx([PEAK / 2, *line], rel=1e-14)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("sqrt", [math.sqrt(part) for part in (1, 0.75, 0.5, 0.25, 0)]),
        ("cosine", [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
    ],
)
def test_the_decay_of_wsd_has_other_shapes(shape, parts):
    found = rates(10, kind="wsd", warmup_steps=2, decay_fraction=0.4, decay_shape=shape)
    assert found[1:6] == pytest.approx([PEAK] * 5, rel=1e-14)
    line = [LEAST + (PEAK - LEAST) * part for part in parts]
    assert found[5:] == pytest.approx(line, rel=1e-12, abs=1e-18)


def test_sqrt_is_the_rate_times_the_root_of_what_remains():
    """Of the last 20% of the run, with nothing left at the end."""
    section = CHOSEN_SCHEDULE.read({"kind": "wsd", "steps": 100, "decay_shape": "sqrt"})
    found = [section.rate(step, 100, lr=0.01, min_lr=0.0) for step in (50, 79, 89, 98)]
    assert found == pytest.approx([0.01, 0.01, 0.01 * math.sqrt(0.5), 0.01 * math.sqrt(0.05)])


@given(
    st.integers(1, 400),
    st.sampled_from(["cosine", "linear", "wsd"]),
    st.floats(0, 0.9),
    st.floats(0.01, 1.0),
    st.sampled_from(["linear", "sqrt", "cosine"]),
)
def test_the_last_step_takes_min_lr_and_no_step_leaves_the_range(
    num_steps, kind, warmup_fraction, decay_fraction, decay_shape
):
    found = rates(
        num_steps,
        kind=kind,
        warmup_fraction=warmup_fraction,
        decay_fraction=decay_fraction,
        decay_shape=decay_shape,
    )
    warmup = round(warmup_fraction * num_steps)
    if warmup < num_steps:
        assert found[-1] == pytest.approx(LEAST, rel=1e-12)
    after = found[max(0, warmup - 1) :]
    assert all(LEAST * (1 - 1e-12) <= rate <= PEAK * (1 + 1e-12) for rate in after)
    assert all(one * (1 + 1e-12) >= other for one, other in itertools.pairwise(after))
    assert all(rate > 0 for rate in found)


def test_warm_up_is_one_per_cent_of_the_run_unless_it_is_set():
    assert num_warmup_steps() == 10
    assert num_warmup_steps(warmup_fraction=0.25) == 250
    assert num_warmup_steps(warmup_fraction=0) == 0
    assert num_warmup_steps(warmup_steps=7) == 7
    assert num_warmup_steps(warmup_steps=0) == 0


def test_the_default_shape_is_cosine():
    schedule = CHOSEN_SCHEDULE.read({"steps": 100})
    expected = LEAST + 0.5 * (PEAK - LEAST) * (1 + math.cos(math.pi * 24 / 99))
    assert schedule.rate(24, 100, **RATES) == pytest.approx(expected, rel=1e-14)


def test_warm_up_longer_than_the_run_never_reaches_the_peak():
    found = rates(5, kind="cosine", warmup_steps=10)
    assert found == pytest.approx([PEAK * part / 10 for part in range(1, 6)], rel=1e-14)
