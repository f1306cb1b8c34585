"""One attempt at a run: a claim that no two processes hold, a child process, and what it left.

In a run's folder: `attempt.lock`, held by whoever trains there for a sweep; `attempt.json`, how the
last attempt ended; `attempt.yaml`, the configuration that it was given; `console.log`, what all
attempts printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.config import dump_config
from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.files import read_json, remove_leftovers, write_text_whole
from megatron_mdm.core.launcher import drop_launch
from megatron_mdm.core.locks import HeldLock, LockHeldError
from megatron_mdm.studies.sweeps.run_sizes import SizedRun

ATTEMPT, ATTEMPT_LOCK, ATTEMPT_CONFIG = "attempt.json", "attempt.lock", "attempt.yaml"
CONSOLE_LOG = "console.log"
_LAST_LINE_LENGTH = 500


class Attempt(BaseModel):
    """How an attempt at a run went.

    Attributes:
        started: Seconds since 1970.
        ended: Seconds since 1970; None while it runs, and for ever if its sweep was killed.
        exit_status: Of the process; negative: the signal that ended it.
        was_asked_to_stop: Did the sweep ask it to stop?
        last_line: Its error, or else the last line that it printed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    if not path.exists():
        return None
    remedy = "remove it."
    try:
        return Attempt.model_validate(read_json(path, remedy))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(f"{path} is not an attempt ({field}: {first['msg']}): {remedy}") from None


def claim(folder: Path) -> HeldLock | None:
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
class Slot:
    """A part of the machine.

    Attributes:
        cores: Cores that a run computes on; empty: whatever there is.
        device: The GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None: as the sweep does.
    """

    cores: tuple[int, ...] = ()
    device: str | None = None


def divide_machine(num_slots: int, cores: Sequence[int], devices: Sequence[str]) -> list[Slot]:
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
        slots.append(Slot(tuple(mine), devices[slot % len(devices)] if devices else None))
    return slots


class Child:
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
        self, run: SizedRun, command: Sequence[str | Path], slot: Slot, claimed: HeldLock
    ) -> None:
        self.run, self.slot = run, slot
        self._claimed = claimed
        self._asked_at: float | None = None
        self._attempt = Attempt(started=time.time())
        self._record(self._attempt)
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
        self._record(
            self._attempt.model_copy(
                update={
                    "ended": time.time(),
                    "exit_status": status,
                    "was_asked_to_stop": self._asked_at is not None,
                    "last_line": self._last_line(),
                }
            )
        )
        self._claimed.release()
        return True

    def _record(self, attempt: Attempt) -> None:
        write_text_whole(self.run.folder / ATTEMPT, attempt.model_dump_json(indent=2) + "\n")

    def _last_line(self) -> str:
        with (self.run.folder / CONSOLE_LOG).open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return next(reversed(errors or lines), "")[:_LAST_LINE_LENGTH]


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
