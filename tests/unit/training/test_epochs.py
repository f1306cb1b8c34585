from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_examples import changed

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.training.description import describe
from megatron_mdm.training.epochs import Epochs, check_validation_interval, parse_fraction


@settings(deadline=None, max_examples=40)
@given(
    num_windows=st.integers(1, 200),
    batch=st.integers(1, 12),
    every=st.fractions(Fraction(1, 5), 3, max_denominator=50),
)
def test_the_kth_stretch_ends_with_the_first_step_that_has_seen_it(num_windows, batch, every):
    epochs = Epochs(num_windows, batch)
    ends = {math.ceil(k * every * num_windows / batch) for k in range(1, 1801)}
    for step in range(1, 31):
        assert epochs.ends_with(step, every) == (step in ends)


def test_a_tenth_of_an_epoch_is_a_tenth_however_long_the_run():
    epochs = Epochs(num_windows=30, global_batch_size=3)
    tenth = parse_fraction(0.1)
    assert all(epochs.ends_with(step, tenth) for step in range(10**6, 10**6 + 50))


@settings(deadline=None)
@given(num_windows=st.integers(1, 10**9), batch=st.integers(1, 5000))
def test_the_interval_that_a_refusal_names_is_accepted(num_windows, batch):
    def check(every):
        config = parse_config(
            {
                "run": {"dir": "unused"},
                "model": {"preset": "dc-7M", "vocab_size": 300},
                "data": {"train": [{"path": "unused"}]},
                "batch": {"global_batch_size": batch},
                "schedule": {"steps": 1},
                "validation": {"every_epochs": every},
            }
        )
        check_validation_interval(config, num_windows)

    with pytest.raises(ConfigError, match="every_epochs") as caught:
        check(0.99 * batch / num_windows)
    least = float(re.search(r"use at least (\S+),", str(caught.value))[1])
    check(least)
    assert least <= 1.02 * batch / num_windows


def test_a_run_that_would_validate_more_than_once_a_step_is_refused_at_its_start(tree):
    # 100 tokens are twelve windows, a step takes four.
    with pytest.raises(ConfigError) as caught:
        describe(parse_config(changed(tree, validation={"every_epochs": 0.3})))
    assert str(caught.value) == (
        "validation.every_epochs=0.3 of the 12 training windows is less than one step of "
        "batch.global_batch_size=4 samples: use at least 0.334, or validation.every_steps=1."
    )
    describe(parse_config(changed(tree, validation={"every_epochs": 0.334})))


def test_one_interval_of_validation_at_most(tree):
    with pytest.raises(ConfigError, match="both set"):
        parse_config(changed(tree, validation={"every_epochs": 1, "every_steps": 5}))
