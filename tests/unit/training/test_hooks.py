"""The loop calls hooks in order, closes them whatever happens, and gives them their state back."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import CheckpointError, DataError
from megatron_mdm.reporting.metrics import MetricsLogger, read_metrics
from megatron_mdm.training.engine import StepResult
from megatron_mdm.training.hook_list import load_states
from megatron_mdm.training.hooks import Hook, TrainingRun
from megatron_mdm.training.logs import Log
from megatron_mdm.training.trainer import Trainer

NUM_STEPS = 3


class Recorder(Hook):
    """Writes down when it is called.

    Args:
        name: Its name.
        calls: Where to.
    """

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.refuses_step: int | None = None
        self.error: Exception | None = None

    def before_step(self, run: TrainingRun) -> None:
        self.calls.append(f"{self.name} before {run.step}")

    def accepts_update(self, run: TrainingRun) -> bool:
        return run.step != self.refuses_step

    def after_step(self, run: TrainingRun) -> None:
        self.calls.append(f"{self.name} after {run.step}")

    def close(self) -> None:
        self.calls.append(f"{self.name} closed")
        if self.error is not None:
            raise self.error


class Engine:
    """Takes no step, but asks whether to."""

    def train_step(
        self, step: int, batches: Any, lr: float, accepts: Any, decay_factor: float
    ) -> StepResult:
        loss_sum = torch.tensor(float(step), dtype=torch.float64)
        return StepResult(loss_sum, 1.0, accepts(loss_sum))


class Batches:
    """Nothing, step after step."""

    def iterate(self, first: int, last: int, threads: int) -> Any:
        yield from ([] for _ in range(first, last))


@pytest.fixture
def run() -> TrainingRun:
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "dc-7M", "vocab_size": 300},
            "data": {"train": [{"path": "unused"}]},
            "batch": {"global_batch_size": 1},
            "schedule": {"steps": NUM_STEPS},
        }
    )
    calls: list[str] = []
    watchdog = SimpleNamespace(mark=lambda step, place: None)
    plan = SimpleNamespace(config=config, num_steps=NUM_STEPS, first_step=0, saved=None)
    hooks = [Recorder("first", calls), Recorder("second", calls)]
    return TrainingRun(plan, Engine(), hooks, watchdog, None)  # type: ignore[arg-type]


def fit(run: TrainingRun) -> list[str]:
    """Trains; returns the calls of the hooks."""
    Trainer(run, Batches()).fit()  # type: ignore[arg-type]
    return run.hooks[0].calls  # type: ignore[attr-defined]


def test_hooks_are_called_in_order_and_closed_from_the_last_to_the_first(run):
    assert fit(run) == [
        *(
            f"{name} {moment} {step + (moment == 'after')}"
            for step in range(NUM_STEPS)
            for moment in ("before", "after")
            for name in ("first", "second")
        ),
        "second closed",
        "first closed",
    ]


def test_any_hook_may_leave_an_update_out(run):
    run.hooks[1].refuses_step = 1
    fit(run)
    assert (run.step, run.num_skipped) == (NUM_STEPS, 1)


def test_a_hook_ends_the_run_after_its_step(run):
    def stop(run: TrainingRun) -> None:
        run.stopped_by = "a signal"

    run.hooks[0].after_step = stop
    calls = fit(run)
    assert calls[-3:] == ["second after 1", "second closed", "first closed"]
    assert run.step == 1


def test_what_a_hook_logs_is_a_record_of_its_own_also_where_the_step_is_none(run, tmp_path):
    def measure(run: TrainingRun) -> None:
        run.log({"own/number": 2.5 * run.step})
        run.stopped_by = "a signal" if run.step == 2 else None

    reporting = run.config.reporting.model_copy(update={"log_every_steps": 50})
    run.plan.config = run.config.model_copy(update={"reporting": reporting})
    run.plan.data = SimpleNamespace(train=SimpleNamespace(num_windows=4))
    run.plan.run_dir = tmp_path
    run.hooks[0].after_step = measure
    run.hooks[1] = Log(run.plan, MetricsLogger(tmp_path, resume_step=None))
    fit(run)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(one["step"], one["own/number"], one["epoch"]) for one in found] == [
        (1, 2.5, 0.25),
        (2, 5.0, 0.5),
    ]
    assert run.records == []


def test_what_fails_at_the_end_gives_way_to_what_failed_before(run):
    def fail(run: TrainingRun) -> None:
        raise DataError("a damaged shard")

    run.hooks[0].after_step = fail
    run.hooks[1].error = CheckpointError("a full disk")
    with pytest.raises(DataError, match="a damaged shard"):
        fit(run)
    assert run.hooks[0].calls[-2:] == ["second closed", "first closed"]


def test_what_fails_at_the_end_alone_is_told_and_all_are_closed(run):
    run.hooks[1].error = CheckpointError("a full disk")
    with pytest.raises(CheckpointError, match="a full disk"):
        fit(run)
    assert run.hooks[0].calls[-2:] == ["second closed", "first closed"]


def test_time_that_is_paused_adds_up(run, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for seconds in (2.0, 3.0):
        with contextlib.suppress(KeyError), run.paused():
            now[0] += seconds
            raise KeyError
    assert run.paused_seconds == 5.0


class Counter(Hook):
    """Has a state."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Other(Counter):
    """Has one of its own, by another name than its class's."""

    name = "other one"


def test_states_find_their_hooks_by_name_and_a_new_hook_begins_anew():
    hooks = [Counter(), Other(), Hook()]
    states = {"other one": {"count": 2}, "a hook of before": {"count": 9}}
    (remark,) = load_states(hooks, SimpleNamespace(step=7, state=states))  # type: ignore[arg-type]
    assert [hook.name for hook in hooks[:2]] == ["Counter", "other one"]
    assert (hooks[0].count, hooks[1].count) == (0, 2)
    for part in ("step_00000007", "Counter", "begins anew"):
        assert part in remark
