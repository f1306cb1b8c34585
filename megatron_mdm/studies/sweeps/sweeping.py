"""Runs of a sweep on this machine, some at a time, until all are done or a signal asks to stop."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_mdm.core.errors import EXIT_REQUEUE
from megatron_mdm.core.locks import is_locked
from megatron_mdm.studies.sweeps.attempts import Child, claim, divide_machine
from megatron_mdm.studies.sweeps.run_sizes import SizedRun
from megatron_mdm.studies.sweeps.run_states import (
    RUN_LOCK,
    reached_end,
    read_state,
    read_states,
)
from megatron_mdm.studies.sweeps.sweep_display import Display, describe_end, describe_progress

_EXIT_NOT_ALL_DONE = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 0.1


class LocalSweep:
    """Runs of a sweep, one child process each.

    Args:
        runs: What to run, in this order.
        command: Interpreter and training script.
        display: Is told what happens.
        jobs: Runs at a time; the cores of this process are divided between them.
        limit: Most runs to start; None: all.
        retry_failed: Start runs again whose last attempt ended with an error.
        save_seconds: How long a run may take to save after it was asked to stop.
    """

    def __init__(
        self,
        runs: Sequence[SizedRun],
        command: Sequence[str | Path],
        display: Display,
        *,
        jobs: int = 1,
        limit: int | None = None,
        retry_failed: bool = True,
        save_seconds: float = 120.0,
    ) -> None:
        self._runs, self._command = runs, command
        self._display = display
        self._limit, self._retry_failed = limit, retry_failed
        self._save_seconds = save_seconds
        self._free = deque(divide_machine(jobs, _cores(), _devices()))
        self._children: list[Child] = []
        self._started: list[SizedRun] = []
        self._elsewhere: list[SizedRun] = []
        self._stopped_by: signal.Signals | None = None

    def run(self) -> int:
        """Runs what is not done.

        Returns:
            Exit status: 0 if nothing is left to do, or the limit was reached and what was started
            is done; 75 if a signal asked to stop; 1 if a run failed, ended early, or is being run
            by another process.

        Raises:
            ConfigError: A folder holds a run of another configuration; before any run starts.
        """
        states = read_states(self._runs)
        waiting = deque(
            run
            for run in self._runs
            if not states[run.name].has_ended
            and (self._retry_failed or states[run.name].status != "failed")
        )
        self._display.event(
            f"{len(self._runs)} runs, {len(self._runs) - len(waiting)} of them done or left out"
        )
        with _signals_taken(self._stop):
            try:
                self._work_off(waiting)
            finally:
                # Only an error leaves some: they save and stop.
                while self._children:
                    for child in self._children:
                        child.ask_to_stop()
                    self._work_off(deque())
        return self._conclude()

    def _work_off(self, waiting: deque[SizedRun]) -> None:
        while self._children or (waiting and self._may_start()):
            if waiting and self._free and self._may_start():
                self._start(waiting.popleft())
                continue
            self._collect()
            self._display.progress(lambda: self._progress_line(len(waiting)))
            time.sleep(_POLL_SECONDS)

    def _may_start(self) -> bool:
        within_limit = self._limit is None or len(self._started) < self._limit
        return within_limit and self._stopped_by is None

    def _start(self, run: SizedRun) -> None:
        claimed = claim(run.folder)
        if claimed is None or is_locked(run.folder / RUN_LOCK):
            if claimed is not None:
                claimed.release()
            self._elsewhere.append(run)
            self._display.event(f"{run.name}: another process is running it")
            return
        # Another process may have ended it since the states were read.
        if reached_end(run):
            claimed.release()
            return
        step = read_state(run).step
        self._display.event(f"{run.name}: started" + (f", after step {step}" if step else ""))
        self._children.append(Child(run, self._command, self._free.popleft(), claimed))
        self._started.append(run)
        if self._stopped_by is not None:
            # The signal came while the child was being made.
            self._children[-1].ask_to_stop()

    def _collect(self) -> None:
        for child in list(self._children):
            if child.poll(self._save_seconds):
                self._children.remove(child)
                self._free.append(child.slot)
                self._display.event(describe_end(child.run.name, read_state(child.run)))

    def _stop(self, number: signal.Signals) -> None:
        self._stopped_by = number
        for child in self._children:
            child.ask_to_stop()

    def _progress_line(self, num_waiting: int) -> str:
        running = {child.run.name: read_state(child.run) for child in self._children}
        return describe_progress(running, num_waiting)

    def _conclude(self) -> int:
        runs = self._runs
        if self._limit is not None:
            names = {run.name for run in (*self._started, *self._elsewhere)}
            runs = [run for run in runs if run.name in names]
        states = {run.name: read_state(run) for run in runs}
        unfinished = {name: one for name, one in states.items() if one.status != "done"}
        if self._stopped_by is not None and unfinished:
            self._display.event(
                f"stopped by {self._stopped_by.name}: start the same command again to go on"
            )
            return EXIT_REQUEUE
        if not unfinished:
            self._display.event("all done")
            return 0
        self._display.event(f"{len(unfinished)} of {len(runs)} runs are not done:")
        for name, state in unfinished.items():
            self._display.event("  " + describe_end(name, state))
        return _EXIT_NOT_ALL_DONE


@contextmanager
def _signals_taken(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        del frame
        stop(signal.Signals(number))

    before = {number: signal.signal(number, handler) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _devices() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [device for device in listed.split(",") if device]
