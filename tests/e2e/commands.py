"""The project's commands as real processes: started together, ended within a hard limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import forked
from threads import TEST_THREADS

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300

# Of the tiny run that all tests start from.
VOCAB_SIZE, SEQ_LENGTH, NUM_STEPS = 300, 32, 8

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@dataclass(frozen=True)
class Result:
    """What a process left.

    Attributes:
        status: Exit status; negative: the signal that ended it.
        output: Standard output.
        errors: Standard error.
    """

    status: int
    output: str
    errors: str

    @property
    def error_lines(self) -> list[str]:
        """Lines that this project's error handling printed."""
        return [line for line in self.errors.splitlines() if line.startswith("error:")]

    def succeeded(self) -> Result:
        """Itself, after checking the exit status."""
        assert self.status == 0, f"status {self.status}\n{self.output}\n{self.errors}"
        return self


def environment_of_a_process(code: str) -> dict[str, str]:
    """The environment of a command.

    Args:
        code: A folder for model code that an export brings along; processes side by side must not
            share it.
    """
    env = {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCHER}
    return env | {
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_MODULES_CACHE": code,
    }


class Process:
    """A running command in a session of its own.

    Args:
        command: Arguments after the Python interpreter.
        cores: Cores to run on; None: all. As many as it has threads make tiny models faster:
            waiting for a core costs more than a free one brings.
        cwd: Working folder.
    """

    def __init__(self, command: Sequence[object], cores: set[int] | None, cwd: Path) -> None:
        self._words = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name, name) for name in ("out", "err"))
        environment = environment_of_a_process(self._folder.name)
        if self._words[0].endswith(".py"):
            self._process: ForkServerProcess | subprocess.Popen[bytes] = forked.start(
                self._words,
                cores=cores,
                cwd=cwd,
                environment=environment,
                output=self._output,
                errors=self._errors,
            )
            return

        def pin() -> None:
            if cores is not None and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)

        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=pin,
            )

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of its own."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def wait(self, deadline: float) -> Result:
        """Waits for the end; kills the command with all its children when time is over."""
        left_seconds = max(0.0, deadline - time.monotonic())
        status = self._wait(left_seconds)
        if status is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._wait(None)
        output, errors = (
            path.read_text("utf-8", errors="replace") if path.exists() else ""
            for path in (self._output, self._errors)
        )
        self._folder.cleanup()
        assert status is not None, (
            f"no end after {TIMEOUT_SECONDS} s: {self._words}\n{output}\n{errors}"
        )
        return Result(status, output, errors)

    def _wait(self, seconds: float | None) -> int | None:
        """The exit status; None while the process runs on after so many seconds."""
        if isinstance(self._process, subprocess.Popen):
            try:
                return self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        self._process.join(seconds)
        return self._process.exitcode


def cores_of(index: int) -> set[int]:
    """The cores of one of several processes: as many as it has threads, in turn."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    first = index * TEST_THREADS
    return {cores[(first + thread) % len(cores)] for thread in range(TEST_THREADS)}


def run_all(*commands: Sequence[object], cwd: Path = REPO) -> list[Result]:
    """Runs commands at the same time, each on as many cores as it has threads.

    Args:
        *commands: Arguments after the Python interpreter.
        cwd: Working folder.

    Returns:
        A result for each.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    running = [Process(command, cores_of(index), cwd) for index, command in enumerate(commands)]
    return [process.wait(deadline) for process in running]


def run(*command: object) -> Result:
    """Runs one command on all cores.

    Args:
        *command: Arguments after the Python interpreter.

    Returns:
        The result.
    """
    return Process(command, None, REPO).wait(time.monotonic() + TIMEOUT_SECONDS)


def torchrun(num_processes: int, *command: object) -> Result:
    """Runs a script under torchrun, on a port that the system chooses."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    return run(*launcher, f"--nproc_per_node={num_processes}", *command)


def pretrain(recipe: Path, run_dir: Path, *overrides: str, script: str = "pretrain_mdm") -> list:
    """The command of a training run."""
    return [f"pretrain/{script}.py", "--config", recipe, f"run.dir={run_dir}", *overrides]


class Run(NamedTuple):
    """A finished training run."""

    dir: Path
    recipe: Path
    overrides: list[str]
    result: Result

    def command(self, run_dir: Path, *overrides: str) -> list:
        """The same run in another folder."""
        return pretrain(self.recipe, run_dir, *self.overrides, *overrides)

    def stopped_at_half(self, folder: Path) -> Path:
        """A copy as if the run had been killed while it wrote a line, before its second save."""
        shutil.copytree(self.dir, folder, ignore=shutil.ignore_patterns("wandb", "tensorboard"))
        checkpoints = folder / "checkpoints"
        shutil.rmtree(checkpoints / f"step_{NUM_STEPS:08d}")
        (checkpoints / "latest").write_text(f"step_{NUM_STEPS // 2:08d}\n")
        metrics = folder / "metrics.jsonl"
        metrics.write_bytes(metrics.read_bytes()[:-40])
        return folder
