"""One configuration, an AR and an MDM run, validated at the end of each epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from commands import NUM_STEPS, SEQ_LENGTH, Run, pretrain, run_all

from megatron_mdm.reporting.metrics import read_metrics

NLL, BEST = "valid/nll_nats_per_token", "valid/best_nll_nats_per_token"
# Two steps of eight samples per epoch.
NUM_WINDOWS = 15
OVERRIDES = [
    f"data.train.0.max_unique_tokens={NUM_WINDOWS * SEQ_LENGTH}",
    "objective.stochastic_length_ratio=0",
    "validation.every_steps=null",
    "validation.every_epochs=1",
    "validation.num_train_samples=6",
    "model.hidden_dropout=0.1",
    # High enough that the best validation is not the last.
    "optimizer.lr=0.03",
    "schedule.kind=constant",
]


@pytest.fixture(scope="module")
def pair(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    overrides = {kind: [*OVERRIDES, f"objective.kind={kind}"] for kind in ("ar", "mdm")}
    results = run_all(*(pretrain(recipe, root / kind, *overrides[kind]) for kind in overrides))
    return {
        kind: Run(root / kind, recipe, overrides[kind], result.succeeded())
        for kind, result in zip(overrides, results, strict=True)
    }


def records_of(run_dir, name):
    return [entry for entry in read_metrics(run_dir / "metrics.jsonl") if name in entry]


def without_loss(records):
    progress = ("step", "epoch", "consumed_samples", "consumed_tokens", "consumed_flops_6nd")
    return [[entry[name] for name in (*progress, "valid/noise_seed")] for entry in records]


def test_both_are_validated_at_the_end_of_each_epoch_after_the_same_tokens_and_flops(pair):
    ar, mdm = (records_of(pair[kind].dir, NLL) for kind in ("ar", "mdm"))
    # ceil(k * 15 / 8), and at the end.
    assert [entry["step"] for entry in ar] == [2, 4, 6, NUM_STEPS]
    assert without_loss(ar) == without_loss(mdm)
    parameters = 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 32
    flops = 6 * parameters * NUM_STEPS * 8 * SEQ_LENGTH
    assert ar[-1]["consumed_flops_6nd"] == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("kind", ["ar", "mdm"])
def test_each_validation_logs_the_gap_the_epoch_and_the_best_so_far(pair, kind):
    losses = {
        entry["step"]: entry["train/loss_nats_per_token"]
        for entry in records_of(pair[kind].dir, "train/loss_nats_per_token")
    }
    lines = pair[kind].result.output.splitlines()
    seen = []
    for entry in records_of(pair[kind].dir, NLL):
        gap = entry[NLL] - entry["train/nll_nats_per_token"]
        assert entry["valid/gap_nats_per_token"] == pytest.approx(gap, abs=1e-12)
        error = math.hypot(entry["valid/nll_standard_error"], entry["train/nll_standard_error"])
        assert entry["valid/gap_standard_error"] == pytest.approx(error)
        mean = np.mean([losses[entry["step"] - 1], losses[entry["step"]]])
        assert entry["train/epoch_loss_nats_per_token"] == pytest.approx(mean, rel=1e-12)
        seen.append((entry[NLL], entry["step"]))
        best, step = min(seen)
        assert (entry[BEST], entry["valid/best_step"]) == (best, step)
        line = next(line for line in lines if line.startswith(f"valid at step {entry['step']} "))
        assert (f"| best {best:.4f} at step {step}" in line) == (step < entry["step"])
    assert min(seen) < seen[-1]


def test_a_run_that_goes_on_logs_what_an_uninterrupted_one_does(pair, tmp_path):
    whole = pair["mdm"]
    # The checkpoint of step 4 ends an epoch.
    run_dir = whole.stopped_at_half(tmp_path / "stopped")
    resumed, compared = run_all(
        whole.command(run_dir),
        ["tools/report.py", "--run", pair["ar"].dir, whole.dir, "--output", tmp_path / "pair.html"],
    )
    assert "other conditions" not in resumed.succeeded().output
    expected = records_of(whole.dir, NLL)
    # What was best is known from before the stop.
    assert expected[-1]["valid/best_step"] <= NUM_STEPS // 2
    assert records_of(run_dir, NLL) == expected
    compared.succeeded()
    page = (tmp_path / "pair.html").read_text(encoding="utf-8")
    assert "Loss against epochs" in page
    assert "cannot be compared" not in page
