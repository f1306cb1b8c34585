"""Runs of a sweep on this machine, some at a time, until all are done or a signal asks to stop.

In a run's folder: `attempt.lock`, held by whoever trains there for a sweep; `attempt.json`, how the
last attempt ended; `attempt.yaml`, the configuration that it was given; `console.log`, what all
attempts printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_mdm.config import dump_config
from megatron_mdm.core.errors import EXIT_REQUEUE, ConfigError
from megatron_mdm.core.files import remove_leftovers, write_text_whole
from megatron_mdm.core.launcher import drop_launch
from megatron_mdm.core.locks import HeldLock, LockHeldError, is_locked
from megatron_mdm.studies.sweeps.run_sizes import SizedRun
from megatron_mdm.studies.sweeps.run_states import (
    ATTEMPT,
    ATTEMPT_LOCK,
    RUN_LOCK,
    Attempt,
    has_reached_end,
    read_state,
    read_states,
)
from megatron_mdm.studies.sweeps.sweep_display import Display, describe_end, describe_progress

if TYPE_CHECKING:
    # Plots are imported by a sweep that has a page.
    from megatron_mdm.studies.sweeps.sweep_page import LivePage

ATTEMPT_CONFIG, CONSOLE_LOG = "attempt.yaml", "console.log"
_LAST_LINE_LENGTH = 500
_EXIT_NOT_ALL_DONE = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 0.1


def claim_run(folder: Path) -> HeldLock | None:
    """Claims a run, so that no other sweep starts it.

    Args:
        folder: The run's; made when absent.

    Returns:
        The claim, of this process and of a child that inherits it; None if another process has the
        run.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return HeldLock(folder / ATTEMPT_LOCK)
    except LockHeldError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): give the sweep another dir."
        ) from None


@dataclass(frozen=True)
class MachineShare:
    """A part of the machine.

    Attributes:
        cores: Cores that a run computes on; empty: whatever there is.
        device: The GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None: as the sweep does.
    """

    cores: tuple[int, ...] = ()
    device: str | None = None


def divide_machine(
    num_slots: int, cores: Sequence[int], devices: Sequence[str]
) -> list[MachineShare]:
    """Divides a machine between runs that go on at the same time.

    Args:
        num_slots: Runs at a time, at least 1.
        cores: Cores that may be used.
        devices: GPUs that may be used, where the environment lists some.

    Returns:
        A part for each: cores in equal shares, one at least; GPUs in turn.
    """
    slots = []
    for slot in range(num_slots):
        first, last = (len(cores) * place // num_slots for place in (slot, slot + 1))
        mine = cores[first:last] or cores[slot % max(1, len(cores)) :][:1]
        slots.append(MachineShare(tuple(mine), devices[slot % len(devices)] if devices else None))
    return slots


class RunProcess:
    """A run in a process of its own.

    It is in the process group of the sweep, so that whoever kills the group kills all of it; Ctrl-C
    and a lost terminal reach the sweep alone, which passes them on as a request to save and stop.

    Args:
        run: What to train.
        command: Interpreter and script.
        slot: Where it computes.
        claimed: The claim on the run; given back when the attempt has ended.
    """

    def __init__(
        self, run: SizedRun, command: Sequence[str | Path], slot: MachineShare, claimed: HeldLock
    ) -> None:
        self.run, self.slot = run, slot
        self._claimed = claimed
        self._asked_at: float | None = None
        self._attempt = Attempt(started=time.time())
        self._attempt.write(run.folder / ATTEMPT)
        config = run.folder / ATTEMPT_CONFIG
        for path in (config, run.folder / ATTEMPT):
            remove_leftovers(path)
        write_text_whole(config, dump_config(run.config))
        environment = drop_launch(os.environ)
        if slot.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.device
        with (run.folder / CONSOLE_LOG).open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                # The shell makes place for the run: signals that it ignores stay ignored.
                ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", *command, "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=claimed.descriptors,
            )
        if slot.cores and hasattr(os, "sched_setaffinity"):
            # Training uses as many threads as it has cores; it has not begun to count them.
            os.sched_setaffinity(self._process.pid, slot.cores)

    def ask_to_stop(self) -> None:
        """Asks the run to save and stop; asked again more than a second later, it ends at once."""
        if self._process.poll() is None:
            self._asked_at = self._asked_at or time.monotonic()
            self._process.send_signal(signal.SIGTERM)

    def poll(self, save_seconds: float) -> bool:
        """Looks whether the run has ended, and if so records how and gives up the claim.

        Args:
            save_seconds: A run that has not ended so long after it was asked to is killed.

        Returns:
            Whether it has ended.
        """
        status = self._process.poll()
        if status is None:
            if self._asked_at is not None and time.monotonic() - self._asked_at > save_seconds:
                self._process.kill()
            return False
        end = {
            "ended": time.time(),
            "exit_status": status,
            "was_asked_to_stop": self._asked_at is not None,
            "last_line": self._last_line(),
        }
        self._attempt.model_copy(update=end).write(self.run.folder / ATTEMPT)
        self._claimed.release()
        return True

    def _last_line(self) -> str:
        with (self.run.folder / CONSOLE_LOG).open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return next(reversed(errors or lines), "")[:_LAST_LINE_LENGTH]


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
        pages: Pages that tell how far the runs are.
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
        pages: Sequence[LivePage] = (),
    ) -> None:
        self._runs, self._command = runs, command
        self._display = display
        self._limit, self._retry_failed = limit, retry_failed
        self._save_seconds = save_seconds
        self._pages = pages
        self._free = deque(divide_machine(jobs, _cores(), _devices()))
        self._children: list[RunProcess] = []
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
        for page in self._pages:
            page.update(is_last=True)
        return self._conclude()

    def _work_off(self, waiting: deque[SizedRun]) -> None:
        while self._children or (waiting and self._may_start()):
            if waiting and self._free and self._may_start():
                self._start(waiting.popleft())
                continue
            self._collect()
            for page in self._pages:
                page.update()
            self._display.progress(lambda: self._progress_line(len(waiting)))
            time.sleep(_POLL_SECONDS)

    def _may_start(self) -> bool:
        within_limit = self._limit is None or len(self._started) < self._limit
        return within_limit and self._stopped_by is None

    def _start(self, run: SizedRun) -> None:
        claimed = claim_run(run.folder)
        if claimed is None or is_locked(run.folder / RUN_LOCK):
            if claimed is not None:
                claimed.release()
            self._elsewhere.append(run)
            self._display.event(f"{run.name}: another process is running it")
            return
        # Another process may have ended it since the states were read.
        if has_reached_end(run):
            claimed.release()
            return
        step = read_state(run).step
        self._display.event(f"{run.name}: started" + (f", after step {step}" if step else ""))
        self._children.append(RunProcess(run, self._command, self._free.popleft(), claimed))
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
