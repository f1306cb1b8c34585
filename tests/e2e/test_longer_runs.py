"""Runs that go on beyond the end that they had, and branches."""

from __future__ import annotations

import json
import re
import shutil

import torch
from commands import pretrain, run, run_all

from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.cli.branching import BranchSettings, branch_run
from megatron_mdm.reporting.metrics import read_metrics

LOSS = "train/loss_nats_per_token"
CONSTANT = ["schedule.kind=constant", "validation.every_steps=null", "checkpoint.every_steps=null"]


def losses_of(run_dir) -> dict[int, float]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return {record["step"]: record[LOSS] for record in records if LOSS in record}


def assert_same_end(run_dir, other) -> None:
    """Bit for bit: losses, and all that the last checkpoint holds."""
    assert losses_of(run_dir) == losses_of(other)
    left, right = (
        CheckpointReader(find_latest_checkpoint(folder / "checkpoints"))
        for folder in (run_dir, other)
    )
    assert left.manifest.step == right.manifest.step
    assert left.manifest.state == right.manifest.state
    assert left.list_names() == right.list_names()
    for name in right.list_names():
        for kind in right.manifest.stored_kinds:
            assert torch.equal(left.load(name, kind), right.load(name, kind)), (name, kind)


def test_a_finished_run_that_is_made_longer_is_the_one_that_was_as_long(recipe, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    for result in run_all(
        pretrain(recipe, whole, *CONSTANT, "schedule.steps=20"),
        pretrain(recipe, longer, *CONSTANT, "schedule.steps=10"),
    ):
        result.succeeded()
    again = run(*pretrain(recipe, longer, *CONSTANT, "schedule.steps=20")).succeeded()
    assert "the run has 20 steps now, after 10 before" in again.output
    assert re.search(
        rf"next: export +.* convert to-hf --run {longer} --output {longer}/hf", again.output
    )
    assert_same_end(longer, whole)


def test_a_branch_into_a_decay_is_the_run_that_had_that_decay_from_the_start(recipe, tmp_path):
    whole, trunk, out = (tmp_path / name for name in ("whole", "trunk", "branch"))
    wsd = ["schedule.kind=wsd", "validation.every_steps=null", "checkpoint.every_steps=4"]
    decay = ["schedule.steps=12", "schedule.decay_fraction=0.34"]
    for result in run_all(
        pretrain(recipe, whole, *wsd, *decay),
        pretrain(recipe, trunk, *wsd, "schedule.steps=16", "schedule.decay_fraction=0.25"),
    ):
        result.succeeded()
    branch = branch_run(BranchSettings(source=trunk, step=8, out=out), decay)
    assert (branch.step, branch.num_steps, branch.copied_bytes) == (8, 12, 0)
    shutil.rmtree(trunk)
    result = run("pretrain/pretrain_mdm.py", "--config", branch.config).succeeded()
    assert f"resuming from {branch.checkpoint}" in result.output
    assert_same_end(out, whole)
    lineage = json.loads((out / "run_info.json").read_text())["branched_from"]
    assert (lineage["run"], lineage["step"], lineage["overrides"]) == (str(trunk), 8, decay)
