from __future__ import annotations

import math
from collections.abc import Callable

import bad_steps
import pytest
from bad_steps import FAULTS, same_bits
from layouts import LAYOUTS
from worlds import World

NUM_GOOD = len(FAULTS) + 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dp2-zero0", "fp32"),
        ("dp2-zero1", "fp32"),
        ("dp2-zero1", "bf16"),
        ("dp2-zero2", "bf16"),
        ("dp2-zero3", "fp32"),
        ("dp2-zero3", "bf16"),
        ("tp2-sp-zero1", "fp32"),
        ("pp2-zero0", "fp32"),
        ("pp2-zero1", "bf16"),
        ("pp2-zero2", "fp32"),
    ],
)
def test_bad_steps_leave_everything_as_if_they_had_not_been(
    world_of: Callable[[int], World], name: str, dtype: str
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel, "dtype": dtype}
    expected = world_of(size).run(bad_steps.train, with_faults=False, **common)
    outcomes = world_of(size).run(bad_steps.train, with_faults=True, **common)
    for outcome, without in zip(outcomes, expected, strict=True):
        assert outcome.good_applied == [True] * NUM_GOOD
        assert tuple(outcome.bad) == FAULTS
        for fault, step in outcome.bad.items():
            assert not step.is_applied, fault
            assert step.changed == [], fault
            assert math.isinf(step.grad_norm), fault
            assert math.isfinite(step.loss) == (fault in ("gradient", "refused")), fault
        assert outcome.adam_steps == without.adam_steps == {NUM_GOOD}
        assert outcome.state.keys() == without.state.keys()
        for key, value in without.state.items():
            assert same_bits(outcome.state[key], value), key
