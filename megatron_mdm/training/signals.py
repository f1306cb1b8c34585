"""Requests to stop: a signal to any rank ends the run on all of them at the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mdm.core.launcher import has_lost_launcher
from megatron_mdm.distributed.gathering import gather

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher passes on a signal that its ranks may have received already: no second request.
_SAME_REQUEST_SECONDS = 1.0
# Above every signal's number.
_FAILED = 1000


class StopRequests:
    """Takes stop signals for the length of a context, and agrees on them with all ranks.

    If the launcher that started this rank ends, that counts as SIGHUP: torchrun does not survive a
    SIGUSR1 or SIGKILL, and its ranks would go on with nobody waiting for them.

    The first signal is noted; a second one, more than a second later, ends the process at once with
    status 128 + signal. A thread takes them from a pipe that the C handler writes into, so that
    this works also while the main thread waits inside a collective. Outside of the main thread
    nothing is installed. SIGINT, which a terminal sends at Ctrl-C, stays ignored where it was, as
    in a shell's background jobs and the runs of a sweep.

    Args:
        world_size: Ranks of the run. With several of them a gloo group is made, so every rank has
            to construct this.
        timeout: How long the ranks may wait for each other; None: PyTorch's half an hour.
        say: Is told what becomes of a Ctrl-C, since a step and a save may take a while.
    """

    def __init__(
        self,
        world_size: int,
        timeout: timedelta | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        several = world_size > 1
        self._group = dist.new_group(timeout=timeout, backend="gloo") if several else None
        self._say = say
        self._requested = 0
        self._requested_at = 0.0
        self._agreement: tuple[Any, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._write_end = -1
        self._keeps_ignoring = False

    def __enter__(self) -> StopRequests:
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        threading.Thread(
            target=self._listen, args=(read_end,), name="stop-signals", daemon=True
        ).start()
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, _leave_to_the_thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restores the handlers, or leaves the signals ignored if the process is about to end."""
        if kind is None and self._agreement is not None:
            self._agreement[0].wait()
        if not self._before:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._keeps_ignoring else before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)
        self._before = {}

    def ignore_from_now_on(self) -> None:
        """Keeps the signals ignored after the context.

        A launcher ends the other ranks when the first one exits; that must neither change the exit
        status of a stopped run nor cut off a rank's last words.
        """
        self._keeps_ignoring = True

    def poll(self) -> signal.Signals | None:
        """Asks whether to stop now; each rank has to ask after each of its steps.

        With several ranks the answer is that of the step before: its all-reduce has had a whole
        step's time, so nobody waits for it.

        Returns:
            The signal, the same on every rank, or None.
        """
        return _to_signal(self._agree(self._read_request()))

    def poll_in_part(self, has_failed: bool) -> signal.Signals | bool:
        """Asks within a part of a step in which all ranks make the same calls, as in a validation.

        With several ranks the answer is that of the call before, of this method or of `poll`.

        Args:
            has_failed: Whether this rank cannot go on with the part.

        Returns:
            The same on every rank: the signal, True if a rank failed, or False.
        """
        agreed = self._agree(_FAILED if has_failed else self._read_request())
        return True if agreed == _FAILED else _to_signal(agreed) or False

    def gather_reason(self, reason: str | None) -> str:
        """Tells all ranks why one of them failed; each rank has to call it.

        Args:
            reason: Of this rank, None if it has not failed.

        Returns:
            The reason of the first rank that has one.
        """
        reasons = [reason] if self._group is None else gather(reason, self._group)
        return next((each for each in reasons if each), "")

    def _agree(self, mine: int) -> int:
        """The largest of all ranks' numbers; with several ranks, of those of the call before."""
        if self._group is None:
            return mine
        agreed = 0
        if self._agreement is not None:
            work, value = self._agreement
            work.wait()
            agreed = int(value)
        value = torch.tensor(mine)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._agreement = (work, value)
        return agreed

    def _read_request(self) -> int:
        return self._requested or (signal.SIGHUP if has_lost_launcher() else 0)

    def _listen(self, read_end: int) -> None:
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if not self._requested:
            self._requested, self._requested_at = number, now
            if number == signal.SIGINT:
                self._say("Ctrl-C: saving and ending after this step; a second one ends at once")
        elif now - self._requested_at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def _to_signal(agreed: int) -> signal.Signals | None:
    # A failure that was agreed on in a part is over with it.
    return signal.Signals(agreed) if 0 < agreed < _FAILED else None


def _leave_to_the_thread(number: int, frame: Any) -> None:
    # Python's own handler runs only between two instructions of the main thread.
    del number, frame
