from __future__ import annotations

import math

import pytest

from megatron_mdm.reporting.console import (
    format_count,
    format_duration,
    format_training_line,
    format_validation_line,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.9, "1k"),
        (8100, "8.1k"),
        (12_345, "12.3k"),
        (999_950, "1M"),
        (1_030_000_000, "1.03B"),
        (2.5e12, "2.5T"),
        (math.inf, "inf"),
    ],
)
def test_count_has_three_digits_and_a_magnitude(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (3.21, "3.2s"),
        (45.4, "45s"),
        (59.7, "1m00s"),
        (250, "4m10s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.nan, "unknown"),
    ],
)
def test_duration_has_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


def test_training_line_holds_every_metric():
    record = {
        "step": 120,
        "train/loss_nats_per_token": 5.12341,
        "train/grad_norm": 1.031,
        "train/lr": 3e-4,
        "perf/tokens_per_second": 8100.0,
        "perf/mfu": 0.412,
        "epoch": 0.341,
    }
    assert format_training_line(record, total_steps=900, eta_seconds=250.0) == (
        "step  120/900 | loss 5.1234 nats/token | grad 1.03 | lr 3.0e-04 | 8.1k tok/s | "
        "41% of peak | epoch 0.34 | ETA 4m10s"
    )


def test_training_line_leaves_out_what_is_not_known():
    record = {"step": 1, "train/loss_nats_per_token": math.nan}
    line = format_training_line(record, total_steps=100_000, eta_seconds=None)
    assert line == "step      1/100000 | loss nan nats/token"


def test_validation_line_shows_the_standard_error():
    record = {"step": 200, "valid/nll_nats_per_token": 5.01234}
    one_window = "valid at step 200 | nll 5.0123 nats/token (of one window, without an error)"
    assert format_validation_line(record) == one_window
    record["valid/nll_standard_error"] = 0.021
    line = format_validation_line(record)
    assert line == "valid at step 200 | nll 5.0123 ± 0.0210 nats/token"


def test_validation_line_shows_errors_by_document_the_matched_loss_and_the_paired_change():
    record = {
        "step": 200,
        "valid/nll_nats_per_token": 5.01234,
        "valid/nll_standard_error": 0.021,
        "valid/nll_clustered_error": 0.051,
        "valid/nll_given_first_nats_per_token": 5.0,
        "valid/nll_given_first_standard_error": 0.022,
        "valid/change_since_step": 150,
        "valid/change_nats_per_token": -0.04512,
        "valid/change_standard_error": 0.0084,
    }
    nll = "valid at step 200 | nll 5.0123 ± 0.0210 nats/token (± 0.0510 by document)"
    change = " | -0.0451 ± 0.0084 since step 150"
    assert format_validation_line(record) == f"{nll} | given first 5.0000 ± 0.0220{change}"
    # AR predicts no first tokens: one figure says both.
    same = record | {"valid/nll_given_first_nats_per_token": 5.01234}
    assert format_validation_line(same) == nll + change


def test_validation_line_shows_the_gap_and_an_earlier_best():
    record = {
        "step": 200,
        "valid/nll_nats_per_token": 5.01234,
        "valid/nll_standard_error": 0.021,
        "train/nll_nats_per_token": 4.8,
        "train/nll_standard_error": 0.02,
        "valid/gap_nats_per_token": 0.21234,
        "valid/gap_standard_error": 0.029,
        "valid/best_nll_nats_per_token": 4.99,
        "valid/best_step": 150,
    }
    line = (
        "valid at step 200 | nll 5.0123 ± 0.0210 nats/token | train 4.8000 ± 0.0200 | "
        "gap 0.2123 ± 0.0290"
    )
    assert format_validation_line(record) == line + " | best 4.9900 at step 150"
    assert format_validation_line(record | {"valid/best_step": 200}) == line
    training = {name: value for name, value in record.items() if not name.startswith("valid")}
    line = "valid at step 200 | train 4.8000 ± 0.0200 nats/token"
    assert format_validation_line(training) == line


def test_validation_line_shows_averages_of_the_weights_beside_the_raw_ones():
    record = {
        "step": 200,
        "valid/nll_nats_per_token": 5.01234,
        "valid/nll_standard_error": 0.021,
        "valid_ema/nll_nats_per_token": 4.9,
        "valid_ema/nll_standard_error": 0.02,
        "valid_ema/nll_given_first_nats_per_token": 4.8,
        "valid_ema/less_raw_nats_per_token": -0.11234,
        "valid_ema/less_raw_standard_error": 0.004,
        "valid/best_nll_nats_per_token": 4.99,
        "valid/best_step": 150,
    }
    nll = "valid at step 200 | nll 5.0123 ± 0.0210 nats/token"
    ema = "ema 4.9000 ± 0.0200 (-0.1123 ± 0.0040)"
    assert format_validation_line(record) == f"{nll} | {ema} | best 4.9900 at step 150"


def test_validation_line_shows_every_loss_of_a_run_that_has_several():
    losses = {"nll": 5.0, "as_ar_nll": 5.0, "as_mdm_nll": 5.2, "as_mdm_nll_given_first": 5.1}
    record = {"step": 200, "valid/best_nll_nats_per_token": 4.99, "valid/best_step": 200}
    for name, loss in losses.items():
        record |= {f"valid/{name}_nats_per_token": loss, f"valid/{name}_standard_error": 0.02}
    nll = "valid at step 200 | nll 5.0000 ± 0.0200 nats/token"
    several = "as ar 5.0000 ± 0.0200 | as mdm 5.2000 ± 0.0200"
    assert format_validation_line(record) == f"{nll} | {several}"
