"""A sweep on the console: events, a line that moves while runs go on, and tables."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from megatron_mdm.core.tables import format_table
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.studies.sweeps.run_sizes import SizedRun
from megatron_mdm.studies.sweeps.run_states import STATUSES, RunState

_REFRESH_SECONDS = 1.0
_MOST_RUNS_SHOWN = 3
_CLEAR_LINE, _CLEAR_SCREEN = "\r\x1b[K", "\x1b[H\x1b[2J"


class Display:
    """Writes lines to a stream; on a terminal the last one moves.

    Args:
        stream: Where to write; None: the standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._refreshed = 0.0

    def event(self, text: str) -> None:
        """Writes a line with the time.

        Args:
            text: What happened.
        """
        start = _CLEAR_LINE if self._is_terminal else ""
        self._stream.write(f"{start}{time.strftime('%H:%M:%S')} {text}\n")
        self._stream.flush()

    def progress(self, line: Callable[[], str]) -> None:
        """Replaces the moving line, at most once per second; does nothing without a terminal.

        Args:
            line: Makes its text.
        """
        now = time.monotonic()
        if self._is_terminal and now - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = now
            # A line that wraps could not be cleared.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(_CLEAR_LINE + line()[:width])
            self._stream.flush()

    def page(self, lines: Sequence[str]) -> None:
        """Writes lines; on a terminal in place of all that it shows.

        Args:
            lines: The whole page.
        """
        start = _CLEAR_SCREEN if self._is_terminal else ""
        self._stream.write(start + "\n".join(lines) + "\n")
        self._stream.flush()


def describe_end(name: str, state: RunState) -> str:
    """How a run ended.

    Args:
        name: The run's.
        state: Read after its end.

    Returns:
        For example `ar_seed-0: done, 3.2104 ± 0.0121 nats/token`.
    """
    parts: list[str] = [state.status]
    if state.status != "done":
        parts.append(f"step {state.step} of {state.num_steps}")
    if state.loss is not None:
        parts.append(f"{_loss(state)} nats/token")
    if state.note:
        parts.append(state.note)
    return f"{name}: {', '.join(parts)}"


def describe_progress(running: Mapping[str, RunState], num_waiting: int) -> str:
    """One line on what goes on.

    Args:
        running: Runs that are being trained.
        num_waiting: How many have yet to be started.

    Returns:
        For example `ar_seed-0 120/900 ETA 4m10s | 5 waiting`.
    """
    parts = []
    for name, state in list(running.items())[:_MOST_RUNS_SHOWN]:
        eta = f" ETA {format_duration(state.eta_seconds)}" if state.eta_seconds else ""
        parts.append(f"{name} {state.step}/{state.num_steps}{eta}")
    if len(running) > _MOST_RUNS_SHOWN:
        parts.append(f"{len(running) - _MOST_RUNS_SHOWN} more")
    return " | ".join([*parts, f"{num_waiting} waiting"])


_PLAN = ("run", "state", "objective", "N with", "N", "D", "U", "epochs", "6ND with", "6ND", "steps")


def format_runs(runs: Sequence[SizedRun], states: Mapping[str, RunState]) -> list[str]:
    """What a sweep would run.

    Args:
        runs: Its runs.
        states: By name.

    Returns:
        A table and the sums.
    """
    rows = [
        (
            run.name,
            states[run.name].status,
            run.config.objective.kind,
            format_count(run.num_parameters_with_embeddings),
            format_count(run.num_parameters),
            format_count(run.num_tokens(run.num_steps)),
            format_count(run.unique_tokens),
            f"{run.epochs(run.num_steps):.4g}",
            f"{run.flops_with_embeddings(run.num_steps):.3e}",
            f"{run.flops(run.num_steps):.3e}",
            f"{run.num_steps:,}",
        )
        for run in runs
    ]
    total = sum(run.flops(run.num_steps) for run in runs)
    left = sum(
        run.flops(run.num_steps) - run.flops(states[run.name].step)
        for run in runs
        if not states[run.name].has_ended
    )
    return [
        *format_table(_PLAN, rows, left=(0, 1, 2)),
        "",
        f"{len(runs)} runs, {total:.3e} FLOPs (6 N D without embeddings) in all, {left:.3e} of "
        "them to do",
        "N with and without embeddings, 6 N D in FLOPs of each; U distinct tokens of the training "
        "windows; epochs = D / U",
    ]


def format_status(runs: Sequence[SizedRun], states: Mapping[str, RunState]) -> list[str]:
    """How far the runs of a sweep are.

    Args:
        runs: Its runs.
        states: By name.

    Returns:
        A table and a count by state.
    """
    header = ("run", "state", "step", "nats/token", "ETA", "")
    rows = []
    for run in runs:
        state = states[run.name]
        eta = "" if state.eta_seconds is None else format_duration(state.eta_seconds)
        place = f"{state.step:,}/{state.num_steps:,}"
        rows.append((run.name, state.status, place, _loss(state), eta, state.note))
    return [*format_table(header, rows, left=(0, 1, 5)), "", format_counts(states)]


def format_counts(states: Mapping[str, RunState]) -> str:
    """How many runs are in each state, such as `3 done, 1 failed`."""
    counts = {name: sum(one.status == name for one in states.values()) for name in STATUSES}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _loss(state: RunState) -> str:
    if state.loss is None:
        return ""
    error = state.loss_standard_error
    return f"{state.loss:.4f}" if error is None else f"{state.loss:.4f} ± {error:.4f}"
