"""Ends a run that makes no progress any more."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import NamedTuple

from megatron_mdm.core.errors import EXIT_HANG
from megatron_mdm.training.ranks import RankBoard, format_places

_LONGEST_INTERVAL_SECONDS = 10.0
_INTERVALS_PER_TIMEOUT = 20
# Storage that hangs must not keep the process from its end.
_REPORT_SECONDS = 10.0


class _Mark(NamedTuple):
    step: int
    place: str
    monotonic: float
    clock: float


class Watchdog:
    """Watches over this rank's progress for the length of a context.

    The loop marks its place, which costs nothing. One thread writes the place to the rank's file
    every ten seconds, or every twentieth of a shorter timeout. Another one compares the age of the
    last mark with the timeout; when it is over, the first rank to notice prints where all stand and
    its own Python stacks, and the process ends with status 76.

    Args:
        board: The ranks' files.
        timeout_seconds: Time without a mark; None: only the files are written.
    """

    def __init__(self, board: RankBoard, timeout_seconds: float | None) -> None:
        self._board = board
        self._timeout = timeout_seconds
        self._interval = _LONGEST_INTERVAL_SECONDS
        if timeout_seconds is not None:
            self._interval = min(self._interval, timeout_seconds / _INTERVALS_PER_TIMEOUT)
        self._mark = _Mark(0, "starting", time.monotonic(), time.time())
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._write, name="rank-file", daemon=True)]
        if timeout_seconds is not None:
            self._threads += [threading.Thread(target=self._watch, name="watchdog", daemon=True)]

    @property
    def step(self) -> int:
        """Optimizer steps taken at the last mark."""
        return self._mark.step

    def __enter__(self) -> Watchdog:
        """Starts the threads."""
        self.mark(0, "starting")
        self._write_once()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads."""
        self._ended.set()

    def mark(self, step: int, place: str) -> None:
        """Tells that the rank gets on.

        Args:
            step: Optimizer steps taken.
            place: What comes now.
        """
        self._mark = _Mark(step, place, time.monotonic(), time.time())

    def _write(self) -> None:
        while not self._ended.wait(self._interval):
            self._write_once()

    def _write_once(self) -> None:
        mark = self._mark
        # A full disk is no reason to end a run that need not write.
        with contextlib.suppress(OSError):
            self._board.write(mark.step, mark.place, mark.clock)

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._ended.wait(self._interval):
            if time.monotonic() - self._mark.monotonic > self._timeout:
                reporter = threading.Thread(target=self._report, daemon=True)
                reporter.start()
                reporter.join(_REPORT_SECONDS)
                os._exit(EXIT_HANG)

    def _report(self) -> None:
        mark = self._mark
        self._write_once()
        head = (
            f"error: rank {self._board.rank}: no progress for {self._timeout:g} s at step "
            f"{mark.step} ({mark.place}), longer than faults.hang_timeout_seconds allows"
        )
        if not self._board.claim_last_word():
            print(head, file=sys.stderr, flush=True)  # noqa: T201 - the process is about to end
            return
        table = format_places(self._board.read(), 3 * self._interval + 1.0)
        text = f"{head}; the ranks stand at\n{table}\nStacks of rank {self._board.rank}:"
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - the process is about to end
        faulthandler.dump_traceback(all_threads=True)
