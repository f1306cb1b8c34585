"""Differences between validations, window by window."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.reporting.judged_windows import (
    JudgedWindows,
    mean_difference,
    paired_difference,
    read_judged_windows,
)
from megatron_mdm.reporting.metrics import NLL, MetricsLogger, match_records
from megatron_mdm.reporting.validation_history import ValidationHistory

COUNT = 200


def judged_of(losses_N, step=1, seed=None, windows="some", documents=None):
    losses_N = np.array(losses_N, dtype=float)
    documents = np.arange(len(losses_N)) if documents is None else np.array(documents)
    return JudgedWindows(step, windows, documents, seed, 1, losses_N + 0.5, losses_N)


def test_what_windows_have_in_common_is_not_in_the_error_of_a_difference():
    """Windows differ by 1, models by 0.05, and 0.1 of each window is its own."""
    generator = np.random.default_rng(0)
    common_N = generator.normal(5, 1, COUNT)
    ar, mdm = (
        judged_of(common_N + shift + generator.normal(0, 0.1, COUNT), seed=seed)
        for shift, seed in ((0, None), (0.05, 3))
    )
    difference_N = mdm.nll_given_first_N - ar.nll_given_first_N
    found = paired_difference(ar, mdm)
    assert found.mean == pytest.approx(difference_N.mean())
    assert found.standard_error == pytest.approx(0.1 * math.sqrt(2 / COUNT), rel=0.2)
    own = [one.mean("nll_given_first").standard_error for one in (ar, mdm)]
    assert found.standard_error < math.hypot(*own) / 5


def test_what_a_window_owes_to_a_shared_time_is_not_in_the_error_either():
    """Losses that are a cubic in t, by as much as they differ, leave no error at all."""
    times_N = NoiseBank(COUNT, 1, 7).times_NK[:, 0]
    one, other = judged_of(times_N**3, seed=7), judged_of(2 * times_N**3 + times_N, seed=7)
    found = paired_difference(one, other)
    assert found.mean == pytest.approx((times_N**3 + times_N).mean())
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    # Other noise: nothing is known of what the times have in common.
    apart = paired_difference(one, replace(other, noise_seed=8))
    assert apart.standard_error == pytest.approx(
        np.std(times_N**3 + times_N) / COUNT**0.5, rel=0.01
    )


def test_other_windows_are_not_compared():
    one = judged_of([1, 2, 3])
    assert paired_difference(one, judged_of([1, 2, 3], windows="others")) is None
    assert paired_difference(one, judged_of([1, 2])) is None


def test_the_difference_over_seeds_is_that_of_the_means():
    pairs = [
        (judged_of([1, 2, 3]), judged_of([2, 2, 4])),
        (judged_of([1, 1, 1]), judged_of([1, 2, 3])),
    ]
    found = mean_difference(pairs)
    assert found.mean == pytest.approx(np.mean([0.5, 0.5, 1.5]))
    assert found.standard_error == pytest.approx(np.std([0.5, 0.5, 1.5], ddof=1) / math.sqrt(3))


def test_windows_are_read_as_they_were_written(tmp_path):
    logger = MetricsLogger(tmp_path, resume_step=None)
    written = judged_of([1.25, math.nan, math.inf], step=4, seed=2, documents=[0, 0, 1])
    logger.log_windows(written.as_record())
    logger.close()
    (found,) = read_judged_windows(tmp_path).values()
    assert found.step == 4
    for name, value in vars(written).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert read_judged_windows(tmp_path / "before") == {}


def test_windows_judged_with_an_average_are_not_taken_for_those_of_the_raw_weights(tmp_path):
    logger = MetricsLogger(tmp_path, resume_step=None)
    raw, ema = judged_of([1, 2], step=4), replace(judged_of([0, 1], step=4), weights="ema")
    for one in (raw, ema):
        logger.log_windows(one.as_record())
    logger.close()
    assert "weights" not in raw.as_record()
    assert read_judged_windows(tmp_path)[4].nll_N.tolist() == raw.nll_N.tolist()
    found = read_judged_windows(tmp_path, "ema")[4]
    assert (found.weights, found.nll_N.tolist()) == ("ema", ema.nll_N.tolist())
    assert read_judged_windows(tmp_path, "swa") == {}


def test_windows_judged_by_another_loss_are_not_taken_for_those_of_the_runs_own(tmp_path):
    logger = MetricsLogger(tmp_path, resume_step=None)
    own, other = judged_of([1, 2], step=4), replace(judged_of([0, 1], step=4), judge="mdm")
    for one in (own, other):
        logger.log_windows(one.as_record())
    logger.close()
    assert "judge" not in own.as_record()
    assert read_judged_windows(tmp_path)[4].nll_N.tolist() == own.nll_N.tolist()
    found = read_judged_windows(tmp_path, judge="mdm")[4]
    assert (found.judge, found.nll_N.tolist()) == ("mdm", other.nll_N.tolist())


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}',
        '{"step": 1, "windows": "", "documents": [0, 1], '
        '"noise_seed": null, "draws_per_sample": 1, "nll_nats_per_token": [1.0], '
        '"nll_given_first_nats_per_token": [1.0]}',
    ],
)
def test_a_damaged_file_of_windows_is_named(tmp_path, line):
    (tmp_path / "validations.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"validations.jsonl is damaged at step 1 \(.*move it away"):
        read_judged_windows(tmp_path)


def log(run_dir, history, step, losses, resume_step=None):
    logger = MetricsLogger(run_dir, resume_step=resume_step)
    judged = judged_of(losses, step=step)
    record = {"step": step, NLL: float(judged.nll_N.mean()), "valid/noise_seed": 0}
    history = history or ValidationHistory(run_dir)
    found = history.add(record, judged)
    logger.log_windows(judged.as_record())
    logger.log(record | found)
    logger.close()
    return found


def test_a_validation_is_set_beside_the_best_before_it_also_in_a_run_that_goes_on(tmp_path):
    first = log(tmp_path, None, 1, [4.0, 5.0, 6.0])
    assert first == {"valid/best_nll_nats_per_token": 5.5, "valid/best_step": 1}
    better = log(tmp_path, None, 2, [3.5, 4.5, 5.0], resume_step=1)
    assert better["valid/best_step"] == 2
    assert better["valid/change_since_step"] == 1
    assert better["valid/change_nats_per_token"] == pytest.approx(-2 / 3)
    # -0.5, -0.5 and -1: the windows themselves differ by far more.
    assert better["valid/change_standard_error"] == pytest.approx(1 / 6)
    worse = log(tmp_path, None, 3, [4.0, 4.5, 5.5], resume_step=2)
    assert (worse["valid/best_step"], worse["valid/change_since_step"]) == (2, 2)
    assert worse["valid/change_nats_per_token"] == pytest.approx(1 / 3)
    # Steps that a run does not keep are not compared with.
    again = log(tmp_path, None, 2, [4.0, 4.0, 4.0], resume_step=1)
    assert again["valid/change_since_step"] == 1


def test_a_loss_that_is_not_finite_is_no_change(tmp_path):
    history = ValidationHistory()
    history.add({"step": 1, NLL: 5.0}, judged_of([4.5, 4.5], step=1))
    found = history.add({"step": 2, NLL: math.nan}, judged_of([4.5, math.nan], step=2))
    assert found == {"valid/best_nll_nats_per_token": 5.0, "valid/best_step": 1}


def test_runs_are_compared_by_the_loss_over_what_both_objectives_predict():
    mdm = {
        "step": 1,
        NLL: 5.0,
        "valid/nll_standard_error": 0.1,
        "valid/nll_given_first_nats_per_token": 4.9,
        "valid/nll_given_first_standard_error": 0.2,
        "train/nll_nats_per_token": 4.5,
        "train/nll_given_first_nats_per_token": 4.6,
        "valid/gap_nats_per_token": 0.5,
    }
    old = {"step": 2, NLL: 4.0}
    assert match_records([mdm, old]) == [
        {
            "step": 1,
            NLL: 4.9,
            "valid/nll_standard_error": 0.2,
            "train/nll_nats_per_token": 4.6,
            "valid/gap_nats_per_token": pytest.approx(0.3),
        },
        old,
    ]
