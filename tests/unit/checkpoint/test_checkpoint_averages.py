"""Averages in checkpoints, and averages of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_examples import SHAPES, write_checkpoint

from megatron_mdm.checkpoint.averaging import average_checkpoints
from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.inspection import describe_checkpoint
from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.cli.averaging import average
from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import CheckpointError, ConfigError

EMA = {"hook_states": {"ema": {"is_average": True, "about": "exponential, of 7 steps"}}}
TOKENIZER = {"name": "words", "sha256": "0" * 64, "vocab_size": 11, "eod_token_id": 0}


def config_of(**changes) -> dict:
    tree = {
        "run": {"dir": "runs/a"},
        "model": {
            "num_layers": 1,
            "hidden_size": 12,
            "num_attention_heads": 2,
            "ffn_hidden_size": 8,
            "vocab_size": 11,
        },
        "data": {"train": [{"path": "nowhere"}], "seq_length": 8},
        "batch": {"global_batch_size": 4},
        "schedule": {"steps": 40},
    }
    return parse_config(tree | changes).model_dump(mode="json")


def write(folder: Path, step: int, **changes) -> Path:
    """A checkpoint with weights of its own, which are a function of the step."""
    return write_checkpoint(
        folder, step=step, seed=step, **({"config": config_of()} | EMA | changes)
    )


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (10, 20, 30):
        write(tmp_path / "run" / "checkpoints", step, tensor_size=1 + step % 20 // 10)
    return tmp_path / "run"


def read(path: Path, weights: str = "raw") -> dict[str, np.ndarray]:
    reader = CheckpointReader(path, weights)
    return {name: reader.load(name).numpy() for name in reader.list_names()}


def mean_by_hand(paths: list[Path], weights: str = "raw") -> dict[str, np.ndarray]:
    read_all = [read(path, weights) for path in paths]
    return {
        name: np.mean([one[name].astype(np.float64) for one in read_all], 0).astype(np.float32)
        for name in SHAPES
    }


def test_an_average_is_read_in_the_place_of_the_weights(run):
    path = run / "checkpoints" / "step_00000020"
    raw, ema = read(path), read(path, "ema")
    assert raw.keys() == ema.keys() == SHAPES.keys()
    for name in SHAPES:
        np.testing.assert_array_equal(ema[name], CheckpointReader(path).load(name, "hook.ema"))
        assert not np.array_equal(ema[name], raw[name])
    assert "weights             raw; ema (exponential, of 7 steps)" in describe_checkpoint(path)


def test_an_average_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(run / "checkpoints" / "step_00000020", "swa")
    assert "holds no average 'swa' of the weights (it holds ema)" in str(caught.value)
    plain = write_checkpoint(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"holds no average 'ema' .*\(it holds none\)"):
        CheckpointReader(plain, "ema")
    # It says nothing of averages, as before there were any.
    tree = json.loads((plain / "manifest.json").read_text())
    assert not tree.keys() & {"hook_states", "average_of"}
    assert "weights   " not in describe_checkpoint(plain)


def test_a_tensor_of_a_hook_that_is_missing_or_damaged_is_damage(run):
    path = run / "checkpoints" / "step_00000020"
    file = next(path.glob("hooks-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        verify_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"hooks-.* is missing"):
        verify_checkpoint(path)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_mean_is_that_of_numpy_and_knows_its_origin(run, tmp_path, weights):
    paths = [run / "checkpoints" / f"step_000000{step}" for step in (30, 10, 20)]
    path = average_checkpoints(paths, tmp_path / "mean", weights=weights)
    verify_checkpoint(path)
    found = read(path)
    for name, value in mean_by_hand(paths, weights).items():
        np.testing.assert_array_equal(found[name], value)
    manifest = read_manifest(path)
    assert (manifest.kind, manifest.step, manifest.config) == ("weights", 0, config_of())
    assert manifest.average_of is not None
    assert manifest.average_of.model_dump() == {
        "run": "runs/a",
        "steps": (10, 20, 30),
        "weights": weights,
    }
    what = "weights" if weights == "raw" else "averages 'ema'"
    told = f"average             the mean of the {what} of runs/a after steps 10, 20, 30"
    assert told in describe_checkpoint(path)


def test_checkpoints_of_different_models_runs_or_data_are_refused(run, tmp_path):
    first = run / "checkpoints" / "step_00000010"
    model = config_of()["model"] | {"hidden_size": 16}
    others = {
        "model": {"config": config_of(model=model)},
        "seed": {"config": config_of(run={"dir": "runs/b", "seed": 8})},
        "data": {"data_fingerprint": "g"},
        "weights": {"kind": "weights", "hook_states": {}},
    }
    said = {}
    for name, changes in others.items():
        other = write(tmp_path / name, 20, **changes)
        with pytest.raises(CheckpointError) as caught:
            average_checkpoints([first, other], tmp_path / "mean")
        said[name] = str(caught.value)
    assert (
        f"is of another run than {first} (model.hidden_size=16 where that has 12)" in said["model"]
    )
    assert "(run.seed=8 where that has 0): average checkpoints of one run" in said["seed"]
    assert "which was trained on other data" in said["data"]
    assert "holds weights alone" in said["weights"]
    # Another folder, length or layout is no other run.
    moved = config_of(run={"dir": "elsewhere"}, schedule={"steps": 60})
    again = write(tmp_path / "moved", 20, config=moved)
    assert average_checkpoints([first, again], tmp_path / "mean").exists()
    with pytest.raises(CheckpointError, match="is of step 20, and so is another"):
        average_checkpoints([again, run / "checkpoints" / "step_00000020"], tmp_path / "twice")


def test_a_damaged_checkpoint_is_not_averaged(run, tmp_path):
    path = run / "checkpoints" / "step_00000020"
    file = next(path.glob("weights-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        average(run=run, last=2, output=tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"last": 2}, (20, 30)),
        ({"steps": (30, 10)}, (10, 30)),
        # An epoch of 40 windows is ten steps; the run left out what was not saved.
        ({"every_epoch": True}, (10, 20, 30)),
        ({"every_epoch": True, "last": 1}, (30,)),
    ],
)
def test_the_command_chooses_checkpoints_of_a_run(run, tmp_path, capsys, options, steps):
    (run / "run_info.json").write_text(json.dumps({"unique_tokens": 40 * 8}))
    write(run / "checkpoints", 25)
    if options == {"last": 2}:
        steps = (25, 30)
    average(run=run, output=tmp_path / "mean", **options)
    averaged = read_manifest(tmp_path / "mean" / "step_00000000").average_of
    assert averaged is not None
    assert averaged.steps == steps
    said = capsys.readouterr().out
    assert said.startswith(
        f"wrote {tmp_path}/mean/step_00000000: the mean of the weights of runs/a"
    )
    assert "convert to-hf --run" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "It is open which checkpoints to average: give --last, --steps or --every-epoch"),
        ({"last": 2, "steps": (10,)}, "It is open which checkpoints"),
        ({"last": 4}, "--last=4 is more than the 3 checkpoints"),
        ({"steps": (10, 11)}, "--steps=11 names no checkpoint of"),
        ({"every_epoch": True}, "has no run_info.json"),
        ({"last": 2, "checkpoint": (Path("c"),)}, "give --run, or --checkpoint for each"),
    ],
)
def test_what_cannot_be_chosen_is_refused(run, tmp_path, options, told):
    with pytest.raises(ConfigError) as caught:
        average(run=run, output=tmp_path / "mean", **options)
    assert told in str(caught.value)


def test_checkpoints_may_be_named_one_by_one(run, tmp_path):
    paths = tuple(run / "checkpoints" / f"step_000000{step}" for step in (10, 30))
    average(checkpoint=paths, output=tmp_path / "mean")
    found = read(tmp_path / "mean" / "step_00000000")
    for name, value in mean_by_hand(list(paths)).items():
        assert torch.equal(torch.from_numpy(found[name]), torch.from_numpy(value))
    with pytest.raises(ConfigError, match="--last chooses among the checkpoints of --run"):
        average(checkpoint=paths, last=1, output=tmp_path / "other")
    # Without an epoch's end among them: a remedy that names a number.
    (run / "run_info.json").write_text(json.dumps({"unique_tokens": 28 * 8}))
    for step in (10, 20, 30):
        assert step % 7
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps=7, or average while training"):
        average(run=run, every_epoch=True, output=tmp_path / "other")
