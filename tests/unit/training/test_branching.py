from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from plan_examples import changed, plan_of, write_checkpoint, write_shards

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.cli.branching import BranchSettings, branch_run, describe_branch
from megatron_mdm.config import load_config
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.data.mixture import OrderStart
from megatron_mdm.training.plan import make_plan

WSD = {"kind": "wsd", "steps": 20, "warmup_fraction": 0.1}


@pytest.fixture
def trunk(tree) -> Path:
    """A run whose checkpoints stand at steps 3 and 6."""
    tree["schedule"] = WSD
    for step in (3, 6):
        write_checkpoint(tree, step=step)
    run_dir = Path(tree["run"]["dir"])
    lines = [{"step": step, "train/loss_nats_per_token": 1.0} for step in range(1, 7)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def branch(trunk: Path, *overrides: str, step: int | None = 3):
    out = trunk.parent / "branch"
    return branch_run(BranchSettings(source=trunk, step=step, out=out), overrides)


def test_a_branch_is_a_run_that_goes_on_from_the_checkpoint(trunk):
    made = branch(trunk, "schedule.steps=8", "schedule.decay_fraction=0.5", "optimizer.lr=1e-3")
    plan = make_plan(load_config(made.config))
    assert plan.resume_from == made.checkpoint
    assert (plan.first_step, plan.num_steps) == (3, 8)
    assert plan.config.optimizer.lr == 1e-3
    # Of the trunk's 20 steps.
    assert plan.config.schedule.warmup_steps == 2
    assert plan.data.order_start is None
    verify_checkpoint(made.checkpoint)
    first, following = describe_branch(made).splitlines()
    assert first == f"wrote {made.config}: goes on from step 3 to 8"
    assert following.endswith(f" train --config {made.config}")
    records = [json.loads(line) for line in (plan.run_dir / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2, 3]
    lineage = json.loads((plan.run_dir / "run_info.json").read_text())["branched_from"]
    identity = json.loads((trunk / "checkpoints/step_00000003/manifest.json").read_text())
    assert lineage == {
        "run": str(trunk),
        "step": 3,
        "checkpoint": "step_00000003",
        "manifest_sha256": identity["manifest_sha256"],
        "overrides": ["schedule.steps=8", "schedule.decay_fraction=0.5", "optimizer.lr=1e-3"],
    }


def test_without_a_step_the_latest_checkpoint_is_branched(trunk):
    assert branch(trunk, step=None).step == 6


@pytest.mark.parametrize("links", [True, False])
def test_files_are_linked_where_that_can_be(trunk, monkeypatch, links):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    made = branch(trunk)
    (file,) = made.checkpoint.glob("*.safetensors")
    assert (file.stat().st_nlink == 2) == links
    assert made.copied_bytes == (0 if links else file.stat().st_size)
    verify_checkpoint(made.checkpoint)


def write_source(tmp_path, name, number) -> str:
    return str(write_shards(tmp_path / name, np.arange(number) + 1))


def test_a_source_that_stays_goes_on_with_its_passes_and_a_new_one_begins(tree, trunk, tmp_path):
    sources = [
        {"path": str(tmp_path / "train"), "weight": 1},
        {"path": write_source(tmp_path, "other", 120), "weight": 3},
    ]
    made = branch(trunk, f"data.train={yaml.safe_dump(sources, default_flow_style=True)}")
    for _ in range(2):
        plan = make_plan(load_config(made.config))
        # 3 steps of 4 samples, all of the one source; then 68 samples, 1 to 3.
        assert plan.data.order_start == OrderStart(12, (12, 0))
        assert plan.data.order.count_visits(80) == [12 + 17, 51]
    found = plan.data.order.find_visits(np.arange(12, 80))
    before = plan_of(changed(tree, run={"dir": str(tmp_path / "new")})).data.order
    whole = before.find_visits(np.arange(29))
    mine = found.source_N == 0
    assert found.window_N[mine].tolist() == whole.window_N[12:].tolist()
    assert found.epoch_N[mine].tolist() == whole.epoch_N[12:].tolist()
    assert read_manifest(made.checkpoint).data_fingerprint == plan.data.fingerprint


def test_other_data_in_the_place_of_a_source_begins_its_own_passes(trunk, tmp_path):
    path = write_source(tmp_path, "other", 120)
    made = branch(trunk, f"data.train=[{{path: {path}}}]")
    assert make_plan(load_config(made.config)).data.order_start == OrderStart(12, (0,))


@pytest.mark.parametrize(
    ("override", "was"),
    [
        ("model.hidden_size=32", "16"),
        ("batch.global_batch_size=8", "4"),
        ("data.seq_length=4", "8"),
        ("run.seed=4", "0"),
        ("objective.kind=ar", "mdm"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_as_is_refused_in_one_sentence(trunk, override, was):
    with pytest.raises(ConfigError) as caught:
        branch(trunk, override)
    path = trunk / "checkpoints/step_00000003"
    assert str(caught.value).startswith(f"{override} differs from the {was} of {path}, and ")
    assert not (trunk.parent / "branch").exists()


def test_a_branch_that_ends_before_it_begins_is_refused(trunk):
    with pytest.raises(ConfigError, match=r"ends the branch at step 3, and .* has taken 3"):
        branch(trunk, "schedule.steps=3")


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(trunk):
    with pytest.raises(CheckpointError, match="no checkpoint of step 5: choose one of 3, 6"):
        branch(trunk, step=5)


def test_a_folder_that_holds_a_run_is_left_alone(trunk):
    branch(trunk)
    with pytest.raises(ConfigError, match="holds a run already"):
        branch(trunk, step=6)


def test_passes_of_data_that_changed_cannot_go_on(trunk, tmp_path):
    path = write_source(tmp_path, "other", 120)
    write_source(tmp_path, "train", 100)
    with pytest.raises(DataError, match="are not those that it was trained on"):
        branch(trunk, f"data.train=[{{path: {path}}}]")
