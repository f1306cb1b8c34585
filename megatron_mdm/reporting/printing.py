"""Prints a run's lines on standard output, even if that is closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from types import TracebackType
from typing import TextIO

from megatron_mdm.core.remarks import warn

# Hours of lines; a reader that has stood still for so long gets the rest from metrics.jsonl.
_MAX_WAITING_LINES = 10_000
_LAST_LINES_SECONDS = 5.0


class Printer:
    """Prints lines in the order given, from a thread of its own: a run never waits for a reader.

    A stream that fails is warned of once and gets nothing more. Used as a context manager.

    Args:
        stream: Where to print; None: standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._is_broken = False
        self._thread: threading.Thread | None = None

    def say(self, line: str) -> None:
        """Prints a line, or several, soon.

        Args:
            line: Text without the last end of line.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._print_all, name="printer", daemon=True)
            self._thread.start()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Waits a few seconds for the last lines."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_LAST_LINES_SECONDS)
        self._thread.join(_LAST_LINES_SECONDS)
        if self._thread.is_alive():
            self._discard_what_others_print()
            warn("nobody reads standard output: its last lines are lost, and not metrics.jsonl.")
        self._thread = None

    def __enter__(self) -> Printer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if not self._is_broken:
                self._print(line)

    def _discard_what_others_print(self) -> None:
        # Libraries print there too, and Python itself when it ends, with an error of its own.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _print(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        content = f"{line}\n".encode(encoding, errors="backslashreplace")
        try:
            try:
                descriptor = self._stream.fileno()
            except (OSError, ValueError, AttributeError):
                self._stream.write(content.decode(encoding))
                self._stream.flush()
                return
            # Not through the stream: its lock, held by a write that waits for a reader, would keep
            # the interpreter from ending.
            while content:
                content = content[os.write(descriptor, content) :]
        except (OSError, ValueError) as error:
            self._is_broken = True
            self._discard_what_others_print()
            warn(
                f"standard output cannot be written ({error}): the run goes on without it; its "
                "figures are in metrics.jsonl."
            )
