"""Worlds of gloo ranks that live as long as the test session, and run one task after the other.

Importing torch, Megatron-Core and DeepSpeed takes seconds, so a rank is started once. A task is a
function that a rank can import, with keyword arguments that can be pickled; its result comes back
to the test. Ranks meet in a file, so no port is used.

This file is also the program that a rank runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

# How long a rank may take to import torch and to meet its peers, on a busy machine.
_START_SECONDS = 120.0
# After a first failure the ranks that caused it get this long to be heard.
_GRACE_SECONDS = 0.3
# DeepSpeed keeps a ZeRO-3 model for good, and with it process groups of three threads each, which
# wake a hundred times per second. Ranks with more threads than this make way for new ones.
_MAX_THREADS = 200


class RankFailure(Exception):
    """A task failed on a rank.

    Attributes:
        rank: The rank that failed first.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class WorldTimeout(Exception):
    """A task took too long; the message holds the stacks of all ranks."""


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    stacks: Path


class World:
    """Ranks that run tasks.

    They start with the first task. A failed or late task ends them, and so do too many threads; the
    next task starts them anew.

    Args:
        size: Number of ranks.
        folder: Empty folder for the rendezvous and the logs.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = folder
        self._ranks: list[_Rank] = []
        self._num_starts = 0

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the ranks; none before the first task and after a failure."""
        return [rank.process.pid for rank in self._ranks]

    def run(
        self, function: Callable[..., Any], /, *, timeout_seconds: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Runs a function on every rank.

        Args:
            function: Of a module that a rank can import.
            timeout_seconds: Time for the task, after which all ranks are killed.
            **kwargs: Its arguments, the same on every rank.

        Returns:
            The result of each rank.

        Raises:
            RankFailure: A rank raised an exception or died.
            WorldTimeout: The time was up.
        """
        task = pickle.dumps((function.__module__, function.__qualname__, kwargs))
        if not self._ranks:
            self._start()
        with self._stopped_on_failure():
            for rank in self._ranks:
                # A rank that died since the last task is found when its answer is awaited.
                with contextlib.suppress(BrokenPipeError):
                    rank.connection.send_bytes(task)
            answers = self._answers(function.__qualname__, timeout_seconds)
        if any(_num_threads(pid) > _MAX_THREADS for pid in self.process_ids):
            self.stop()
        return answers

    def stop(self) -> None:
        """Kills the ranks. Idempotent."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.process.stdin.close()  # type: ignore[union-attr]
            rank.connection.close()
        self._ranks = []

    def _start(self) -> None:
        self._num_starts += 1
        folder = self._folder / f"start{self._num_starts}"
        folder.mkdir()
        with self._stopped_on_failure():
            for rank in range(self.size):
                self._ranks.append(_start_rank(rank, self.size, folder))
            self._answers("the start", _START_SECONDS)

    def _answers(self, task: str, timeout_seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        failures: list[tuple[int, str]] = []
        while len(answers) < self.size:
            pending = {
                rank.connection: number
                for number, rank in enumerate(self._ranks)
                if number not in answers
            }
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                number = pending[connection]  # type: ignore[index]
                has_succeeded, answers[number] = self._receive(number)
                if not has_succeeded:
                    failures.append((number, answers[number]))
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise self._failure(task, failures)
        if len(answers) < self.size:
            raise WorldTimeout(
                f"{task} took more than {timeout_seconds} s on {self.size} ranks."
                + self._stacks(answers)
            )
        return [answers[number] for number in range(self.size)]

    def _receive(self, number: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._ranks[number].connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            status = self._ranks[number].process.wait()
            log = self._ranks[number].log.read_text(errors="replace")
            return (
                False,
                f"The process died with status {status}. The end of its log:\n{log[-2000:]}",
            )

    def _failure(self, task: str, failures: list[tuple[int, str]]) -> RankFailure:
        # A rank that is gone is the cause of the broken connections of its peers.
        failures.sort(key=lambda failure: self._ranks[failure[0]].process.poll() is None)
        first, text = failures[0]
        message = f"{task} failed on rank {first} of {self.size}:\n{text}"
        for number, other in failures[1:]:
            message += f"\nand on rank {number}: {other.strip().splitlines()[-1]}"
        return RankFailure(first, message)

    def _stacks(self, answers: dict[int, Any]) -> str:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        text = ""
        for number, rank in enumerate(self._ranks):
            state = "answered" if number in answers else "did not answer"
            stacks = rank.stacks.read_text(errors="replace")
            text += f"\nRank {number} {state}:\n{stacks}"
        return text

    @contextlib.contextmanager
    def _stopped_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.stop()
            raise


def _num_threads(process_id: int) -> int:
    return len(os.listdir(f"/proc/{process_id}/task"))


def _start_rank(rank: int, size: int, folder: Path) -> _Rank:
    ours, theirs = Pipe()
    log, stacks = folder / f"rank{rank}.log", folder / f"rank{rank}.stacks"
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), str(folder / "rendezvous"), stacks],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
        )
    theirs.close()
    return _Rank(process, ours, log, stacks)


def _serve(connection: Connection, rendezvous: Path) -> None:
    connection.send_bytes(_attempt(lambda: _join(rendezvous)))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_attempt(lambda task=task: _run(task)))


def _attempt(call: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((True, call()))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _join(rendezvous: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    size = int(os.environ["WORLD_SIZE"])
    if size > 1:
        # The product's own start would read an address and a port; alone it needs neither.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=int(os.environ["RANK"]),
            world_size=size,
        )


def _run(task: bytes) -> Any:
    module, name, kwargs = pickle.loads(task)
    return getattr(importlib.import_module(module), name)(**kwargs)


def _exit_with_parent() -> None:
    # Nobody writes to this pipe: it ends when the test session does, however that ends.
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _stacks_file = open(sys.argv[3], "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=_stacks_file, all_threads=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _serve(Connection(int(sys.argv[1])), Path(sys.argv[2]))
    # Interpreter shutdown with live gloo groups can hang.
    os._exit(0)
