"""A run with averages of its weights, from its first step to exports, text and another run."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from commands import NUM_STEPS, SEQ_LENGTH, pretrain, run_all
from safetensors.numpy import load_file

from megatron_mdm.checkpoint.storage import CheckpointReader, name_checkpoint
from megatron_mdm.cli.averaging import average
from megatron_mdm.hf.conversion.check import check_export
from megatron_mdm.hf.from_run import export_run
from megatron_mdm.reporting.judged_windows import paired_difference, read_judged_windows
from megatron_mdm.reporting.metrics import NLL, read_metrics

HALF, HORIZON = NUM_STEPS // 2, 700
# The mean is of steps 4, 6 and 8.
HOOKS = (
    f"hooks=[{{kind: ema, horizon_tokens: {HORIZON}}}, {{kind: swa, every_steps: 2, last: 3}}]",
    *("checkpoint.every_steps=1", "checkpoint.keep_last=100"),
)


def curve_of(run_dir):
    """Losses and norms of steps, and what validations said of the raw weights."""
    records = read_metrics(run_dir / "metrics.jsonl")
    names = ("train/loss_nats_per_token", "train/grad_norm")
    return [
        {
            name: value
            for name, value in record.items()
            if name in names or name.startswith(("valid/", "train/nll", "train/epoch"))
        }
        for record in records
    ]


@pytest.fixture(scope="module")
def averaged(recipe, whole_runs, tmp_path_factory):
    """The folder of a run like `whole_runs["mdm"]` that averages."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    (result,) = run_all(whole_runs["mdm"].command(folder, *HOOKS))
    assert " | ema " in result.succeeded().output
    return folder


@pytest.fixture(scope="module")
def exports(averaged, tmp_path_factory):
    """Exports of the raw weights after every step, and of both averages after the last."""
    folder = tmp_path_factory.mktemp("exports")
    for step in range(1, NUM_STEPS + 1):
        export_run(averaged, folder / f"{step}", step=step)
    for weights in ("ema", "swa"):
        export_run(averaged, folder / weights, weights=weights)
    return folder


def test_averaging_changes_no_number_of_the_run(averaged, whole_runs):
    assert curve_of(averaged) == curve_of(whole_runs["mdm"].dir)
    plain = CheckpointReader(whole_runs["mdm"].dir / "checkpoints" / name_checkpoint(NUM_STEPS))
    found = CheckpointReader(averaged / "checkpoints" / name_checkpoint(NUM_STEPS))
    for name in plain.list_names():
        for kind in plain.manifest.stored_kinds:
            assert torch.equal(found.load(name, kind), plain.load(name, kind))


def test_validations_judge_every_average_on_the_windows_of_the_raw_weights(averaged):
    records = [one for one in read_metrics(averaged / "metrics.jsonl") if NLL in one]
    assert [record["step"] for record in records] == [HALF, NUM_STEPS]
    first, last = records
    # The mean has begun with the weights of this very step.
    assert first["valid_swa/nll_nats_per_token"] == first[NLL]
    raw = read_judged_windows(averaged)
    for name in ("ema", "swa"):
        judged = read_judged_windows(averaged, name)
        assert list(judged) == list(raw) == [HALF, NUM_STEPS]
        difference = paired_difference(raw[NUM_STEPS], judged[NUM_STEPS], "nll")
        assert difference is not None
        assert last[f"valid_{name}/less_raw_nats_per_token"] == difference.mean != 0
        assert last[f"valid_{name}/less_raw_standard_error"] == difference.standard_error
        assert last[f"valid_{name}/nll_nats_per_token"] == judged[NUM_STEPS].nll_N.mean()


def test_a_run_that_goes_on_has_the_same_averages_bit_for_bit(averaged, recipe, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(averaged, resumed)
    for step in range(HALF + 1, NUM_STEPS + 1):
        shutil.rmtree(resumed / "checkpoints" / name_checkpoint(step))
    (resumed / "checkpoints" / "latest").write_text(f"{name_checkpoint(HALF)}\n")
    (result,) = run_all(pretrain(recipe, resumed, *HOOKS))
    assert "begins anew" not in result.succeeded().output
    assert curve_of(resumed) == curve_of(averaged)
    left, right = (
        CheckpointReader(folder / "checkpoints" / name_checkpoint(NUM_STEPS))
        for folder in (resumed, averaged)
    )
    assert left.manifest.state == right.manifest.state
    assert right.manifest.stored_kinds[-2:] == ("hook.ema", "hook.swa")
    for name in right.list_names():
        for kind in right.manifest.stored_kinds:
            assert torch.equal(left.load(name, kind), right.load(name, kind)), (name, kind)


def test_an_exported_average_is_the_one_that_is_made_of_exports_by_hand(exports):
    raw = [load_file(exports / f"{step}" / "model.safetensors") for step in range(1, NUM_STEPS + 1)]
    decay = math.exp(-8 * SEQ_LENGTH / HORIZON)
    shares = np.array([decay ** (NUM_STEPS - step) for step in range(1, NUM_STEPS + 1)])
    expected = {"ema": shares / shares.sum(), "swa": np.array([0, 0, 0, 1, 0, 1, 0, 1]) / 3}
    for weights, shares in expected.items():
        found = load_file(exports / weights / "model.safetensors")
        assert found.keys() == raw[0].keys()
        for name, value in found.items():
            by_hand = sum(share * one[name] for share, one in zip(shares, raw, strict=True))
            np.testing.assert_allclose(value, by_hand, rtol=0, atol=1e-6)


def test_exports_say_which_weights_they_hold(averaged, exports, whole_runs, tmp_path):
    told = {
        name: json.loads((exports / name / "training_metadata.json").read_text())
        for name in (f"{NUM_STEPS}", "ema", "swa")
    }
    assert told[f"{NUM_STEPS}"]["weights"] == "raw"
    assert told["swa"]["average"] == "mean of 3 weights, one every 2 steps"
    about = f"exponential, horizon {HORIZON} tokens, of {NUM_STEPS} steps"
    assert (told["ema"]["weights"], told["ema"]["average"]) == ("ema", about)
    card = (exports / "ema" / "README.md").read_text()
    assert f"average ema: {about}" in card
    record = [one for one in read_metrics(averaged / "metrics.jsonl") if NLL in one][-1]
    assert f"{record['valid_ema/nll_nats_per_token']:.4f} " in card.replace("\\", "")
    assert "averages there are: ema, swa" in (
        exports / f"{NUM_STEPS}" / "README.md"
    ).read_text().replace("\\", "")
    # A run without averages exports what it did before there were any.
    plain = export_run(whole_runs["mdm"].dir, tmp_path / "plain").path
    assert "weights" not in json.loads((plain / "training_metadata.json").read_text())


def test_text_and_further_runs_come_from_the_chosen_weights(averaged, exports, recipe, tmp_path):
    mean = tmp_path / "mean"
    average(run=averaged, steps=(4, 6, 8), output=mean)
    assert check_export(averaged, exports / "ema", weights="ema").passed
    hf = export_run(mean, tmp_path / "hf").path
    # The mean of checkpoints is the one that was made while training, to its rounding.
    left, right = (load_file(folder / "model.safetensors") for folder in (hf, exports / "swa"))
    for name, value in right.items():
        np.testing.assert_allclose(left[name], value, rtol=0, atol=3e-7)
    assert (hf / "tokenizer.json").is_file()
    assert "after steps 4, 6, 8" in (hf / "README.md").read_text()
    prompt = ["--prompt", "def ", "--length", "12", "--seed", "3"]
    checkpoint = ["tools/generate.py", "--checkpoint", averaged, *prompt, "--weights"]
    still = ["schedule.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0"]
    named, exported, missing, following = run_all(
        [*checkpoint, "ema"],
        ["tools/generate.py", "--model", exports / "ema", *prompt],
        [*checkpoint, "emma"],
        pretrain(recipe, tmp_path / "next", *still, f"run.initial_weights={mean}"),
    )
    assert named.succeeded().output == exported.succeeded().output
    (line,) = missing.error_lines
    assert "holds no average 'emma' of the weights (it holds ema and swa)" in line
    following.succeeded()
    begun = CheckpointReader(tmp_path / "next" / "checkpoints" / name_checkpoint(1))
    source = CheckpointReader(mean / name_checkpoint(0))
    for name in source.list_names():
        np.testing.assert_allclose(begun.load(name), source.load(name), rtol=0, atol=1e-20)
