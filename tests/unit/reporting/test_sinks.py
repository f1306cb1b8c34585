from __future__ import annotations

import pytest
import wandb

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.reporting import sinks as sinks_module
from megatron_mdm.reporting.sinks import TensorBoardSink, WandbSink, build_sinks


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)


def _read_scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_back_what_the_sink_wrote(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.log({"step": 1, "train/loss": 2.5, "note": "text"}, 1)
    sink.log({"step": 2, "train/loss": 1.5}, 2)
    sink.close()
    assert _read_scalars(tmp_path) == {"train/loss": [(1, 2.5), (2, 1.5)]}


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for first_step, resume_step, value in ((1, None, 2.0), (3, 2, 1.0)):
        sink = TensorBoardSink(tmp_path, resume_step=resume_step)
        for step in range(first_step, 5):
            sink.log({"train/loss": value}, step)
        sink.close()
    assert _read_scalars(tmp_path)["train/loss"] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]


def test_wandb_offline_sink_writes_the_history(tmp_path):
    sink = WandbSink("project", "run", "offline", tmp_path, {"seed": 1}, run_id="abc123")
    sink.log({"step": 3, "train/loss_nats_per_token": 2.5}, 3)
    sink.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    assert b"loss_nats_per_token" in path.read_bytes()


def test_sinks_are_those_of_the_settings(tmp_path):
    assert build_sinks(tmp_path) == []
    (sink,) = build_sinks(tmp_path, tensorboard=True)
    assert isinstance(sink, TensorBoardSink)
    sink.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    with pytest.raises(ConfigError, match=r"reporting\.wandb=onlin is not a mode"):
        build_sinks(tmp_path, wandb_mode="onlin")


@pytest.fixture
def unreachable(monkeypatch):
    """W&B as it behaves without a network or a login."""
    start, modes = wandb.init, []

    def init(*, mode, **settings):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("timed out\nafter a while")
        return start(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", init)
    return modes


def test_a_run_goes_on_offline_where_wandb_cannot_be_reached(tmp_path, unreachable, capsys):
    sink = WandbSink("project", "run", "online", tmp_path, {}, run_id="abc")
    sink.log({"step": 1, "train/loss": 2.5}, 1)
    sink.close()
    assert unreachable == ["online", "offline"]
    assert list(tmp_path.glob("wandb/offline-run-*/run-abc.wandb"))
    said = capsys.readouterr().err
    assert "warning: W&B could not be reached (timed out): its run goes on offline" in said
    with pytest.raises(ConfigError, match=r"wandb=required could not start .*\(timed out\)"):
        WandbSink("project", "run", "required", tmp_path, {})


def test_the_variable_of_wandb_decides_its_mode(tmp_path, unreachable, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbSink("project", "run", "online", tmp_path, {}).close()
    assert unreachable == ["offline"]


def test_the_server_is_not_waited_for_long():
    assert sinks_module._START_SECONDS <= 30
