"""How far a run is, read from its folder alone; another process or machine may be training it."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_mdm.config.continuation import list_computed_fields
from megatron_mdm.config.loading import parse_config, read_tree
from megatron_mdm.core.errors import EXIT_REQUEUE, ConfigError
from megatron_mdm.core.locks import is_locked
from megatron_mdm.data.manifest import Record
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, NLL
from megatron_mdm.reporting.run_folder import RunFolder, find_last_with, format_setting
from megatron_mdm.studies.sweeps.grid import SweepRun
from megatron_mdm.studies.sweeps.run_sizes import SizedRun

Status = Literal["done", "running", "stopped", "waiting", "failed"]
STATUSES: tuple[Status, ...] = ("done", "running", "stopped", "waiting", "failed")

# What training writes into a run's folder, and what a sweep does: held by whoever trains there for
# it, and how the last attempt ended.
RUN_LOCK, CONFIG = "lock", "config.yaml"
ATTEMPT_LOCK, ATTEMPT = "attempt.lock", "attempt.json"


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        status: done: its last checkpoint is written. running: a process holds its lock. stopped:
            it began, and goes on when it is started again. failed: its last attempt ended with an
            error, or its held-out loss is not finite at the end. waiting: it has not begun.
        step: Optimizer steps in its metrics.
        num_steps: Steps of the whole run.
        loss: Last held-out loss, nats per token; None before the first.
        loss_standard_error: Of it.
        eta_seconds: Time to the end at the last logged speed; None unless it is running.
        note: Why it failed or stopped, where that is known.
        has_ended: Has training nothing left to do?
    """

    status: Status
    step: int
    num_steps: int
    loss: float | None = None
    loss_standard_error: float | None = None
    eta_seconds: float | None = None
    note: str = ""
    has_ended: bool = False


class Attempt(Record):
    """How an attempt at a run went.

    Attributes:
        started: Seconds since 1970.
        ended: Seconds since 1970; None while it runs, and for ever if its sweep was killed.
        exit_status: Of the process; negative: the signal that ended it.
        was_asked_to_stop: Did the sweep ask it to stop?
        last_line: Its error, or else the last line that it printed.
    """

    what = "an attempt"
    remedy = "remove it."

    started: float
    ended: float | None = None
    exit_status: int | None = None
    was_asked_to_stop: bool = False
    last_line: str = ""


def read_attempt(folder: Path) -> Attempt | None:
    """Reads how the last attempt at a run went.

    Args:
        folder: The run's.

    Returns:
        The attempt, or None if a sweep has not started this run.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / ATTEMPT
    return Attempt.read(path) if path.exists() else None


class _Curve(NamedTuple):
    step: int
    loss: float | None
    loss_standard_error: float | None
    step_seconds: float | None


def read_state(run: SizedRun) -> RunState:
    """Reads how far a run is.

    Raises:
        DataError: A file in its folder is damaged.
    """
    curve = _read_curve(run.folder)
    has_ended = has_reached_end(run)
    status, note = _status(run.folder, has_ended, curve.loss)
    eta_seconds = None
    if status == "running" and curve.step_seconds is not None:
        eta_seconds = curve.step_seconds * (run.num_steps - curve.step)
    return RunState(
        status,
        curve.step,
        run.num_steps,
        curve.loss,
        curve.loss_standard_error,
        eta_seconds,
        note,
        has_ended,
    )


def read_states(runs: Iterable[SizedRun]) -> dict[str, RunState]:
    """Reads how far runs are, by name, after a look that their folders are theirs.

    Raises:
        ConfigError: A folder holds a run that computes or measures something else.
        DataError: A file in a folder is damaged.
    """
    runs = list(runs)
    for run in runs:
        check_same_run(run)
    return {run.name: read_state(run) for run in runs}


def has_reached_end(run: SizedRun) -> bool:
    """Has a run written its last checkpoint, so that there is nothing left to train?

    Its ledger, which every checkpoint brings up to date, stays when checkpoints are deleted.
    """
    return bool(RunFolder(run.folder).ledger.get("step", -1) >= run.num_steps)


def is_running(folder: Path) -> bool:
    """Does a process train in a folder, or is it about to?"""
    return is_locked(folder / ATTEMPT_LOCK) or is_locked(folder / RUN_LOCK)


def check_same_run(run: SweepRun) -> None:
    """Checks that a run's folder is new or belongs to the run that the sweep describes.

    Args:
        run: A run of a sweep.

    Raises:
        ConfigError: The folder holds a run that computes or measures something else.
    """
    path = run.folder / CONFIG
    if not path.exists():
        return
    before = list_computed_fields(parse_config(read_tree(path)))
    now = list_computed_fields(run.config)
    for field in sorted({*before, *now}):
        if before.get(field) != now.get(field):
            held, wanted = (format_setting(fields.get(field)) for fields in (before, now))
            raise ConfigError(
                f"{run.folder} holds a run with {field}={held}, where the sweep has {wanted}: give "
                "the sweep another dir, restore the field, or remove that folder."
            )


def _status(folder: Path, has_ended: bool, loss: float | None) -> tuple[Status, str]:
    if is_running(folder):
        return "running", ""
    if has_ended:
        if loss is not None and not math.isfinite(loss):
            return "failed", f"its held-out loss is {loss} at the last step"
        return "done", ""
    attempt = read_attempt(folder)
    if attempt is None:
        return ("stopped", "") if (folder / CONFIG).exists() else ("waiting", "")
    if attempt.exit_status is None:
        return "stopped", "killed"
    if attempt.exit_status == EXIT_REQUEUE or attempt.was_asked_to_stop:
        return "stopped", ""
    if attempt.exit_status < 0:
        return "stopped", f"killed by {_signal_name(-attempt.exit_status)}"
    if attempt.exit_status == 0:
        return "stopped", "ended without its last checkpoint"
    return "failed", attempt.last_line or f"ended with status {attempt.exit_status}"


def _read_curve(folder: Path) -> _Curve:
    try:
        found = (folder / METRICS_FILE_NAME).stat()
    except FileNotFoundError:
        return _Curve(0, None, None, None)
    return _parse_curve(folder, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _parse_curve(folder: Path, size: int, mtime_ns: int) -> _Curve:
    # Size and time tell one state of the file from the next: only running runs are read again.
    del size, mtime_ns
    left = RunFolder(folder)
    seconds = find_last_with(left.records, "perf/step_seconds") or {}
    valid = left.last_validation
    return _Curve(
        left.step,
        valid.get(NLL),
        valid.get("valid/nll_standard_error"),
        seconds.get("perf/step_seconds"),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
