"""The command line of the training scripts."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.training import command

MINIMAL = """
run: {dir: runs/tiny}
model: {preset: smdm-6M, vocab_size: 64}
data: {train: [{path: shards}], seq_length: 16}
batch: {global_batch_size: 4}
schedule: {steps: 2}
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs the command line and gives what would be started."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    started = []
    monkeypatch.setattr(command, "_run", lambda config, dry: started.append((config, dry.run)))

    def run(*words, overrides=(), kind=None):
        words = [str(path) if word == "FILE" else word for word in words]
        if kind is None:
            run_command(command.pretrain, "Trains.", [*overrides, *words])
        else:
            run_command(command.finetune, "Fine-tunes.", [*words, f"objective.kind={kind}"])
        return started.pop() if started else None

    return run


def test_options_and_overrides_stand_in_any_order(start):
    orders = (
        ("--config", "FILE", "run.seed=7", "data.seq_length=32", "--dry-run"),
        ("run.seed=7", "--dry-run", "--config", "FILE", "data.seq_length=32"),
        ("run.seed=7", "data.seq_length=32", "--dry-run", "--config", "FILE"),
    )
    for words in orders:
        config, is_dry = start(*words)
        assert (config.run.seed, config.data.seq_length, is_dry) == (7, 32, True)


def test_a_launcher_may_add_the_local_rank(start, capsys):
    for words in (("--local_rank=3",), ("--local_rank", "3")):
        config, is_dry = start(*words, "--config", "FILE", "run.seed=7")
        assert (config.run.seed, is_dry) == (7, False)
    assert start("--help") is None
    shown = capsys.readouterr().out
    assert "--dry-run" in shown
    assert "local" not in shown


def test_the_command_line_goes_before_the_script_and_fine_tuning_before_both(start, tmp_path):
    config, _ = start("--config", "FILE", overrides=["objective.kind=ar"])
    assert config.objective.kind == "ar"
    words = ("--config", "FILE", "objective.kind=mdm")
    assert start(*words, overrides=["objective.kind=ar"])[0].objective.kind == "mdm"
    with pytest.raises(ConfigError, match="initial_weights is not set"):
        start("--config", "FILE", kind="ar")
    config, _ = start(*words, f"run.initial_weights={tmp_path}", kind="ar")
    assert (config.objective.kind, config.finetuning.enabled) == ("ar", True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--config"),
        (("--config",), "--config"),
        (("--config", "FILE", "--steps", "3"), "--steps"),
        (("--config", "FILE", "--local_rank=x"), "--local_rank"),
        (("--config", "FILE", "seed"), "seed"),
    ],
)
def test_what_a_command_line_lacks_or_has_too_much_is_named(start, words, named):
    with pytest.raises(ConfigError, match=named):
        start(*words)


@pytest.mark.parametrize(("device", "accelerator"), [("cpu", "cpu"), ("auto", None)])
def test_deepspeed_computes_where_the_run_does(monkeypatch, tmp_path, device, accelerator):
    """On a machine with a GPU, which DeepSpeed would take for itself."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    command._run(load_config(path, [f"run.device={device}"]), command.Dry(run=True))
    assert os.environ.get("DS_ACCELERATOR") == accelerator


def test_kernels_are_ordered_before_anything_looks_for_a_gpu(monkeypatch, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    name, seen = "CUDA_DEVICE_MAX_CONNECTIONS", []
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(os.environ[name]))
    split = ["parallel.tensor_model_parallel_size=2", "run.device=auto"]
    command._run(load_config(path, split), command.Dry(run=True))
    assert set(seen) == {"1"}
