"""One run a folder at a time."""

from __future__ import annotations

import fcntl
import sys
import time
from pathlib import Path
from typing import IO

from megatron_mdm.core.errors import ConfigError

LOCK_FILE_NAME = "lock"
# Whoever asks whether a run is going on holds its lock for a moment.
_PATIENCE_SECONDS = 1.0


class RunLock:
    """Holds `run.dir/lock` from the first call of `acquire` until `release`.

    The kernel gives the lock back when the process ends, however it ends: a lock cannot be left
    behind. Entering the context locks a folder that is there; a new one is not made before
    `acquire`.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RunLock:
        """Locks the folder if it exists."""
        if self._run_dir.is_dir():
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back."""
        self.release()

    def acquire(self) -> None:
        """Locks the folder, and makes it if it is not there. Idempotent.

        Raises:
            ConfigError: Another run has locked the folder, or it cannot be written.
        """
        if self._file is not None:
            return
        path = self._run_dir / LOCK_FILE_NAME
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError as error:
            raise ConfigError(
                f"run.dir={self._run_dir} cannot be written ({error.strerror}): choose another "
                "folder."
            ) from None
        try:
            _lock(file)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"run.dir={self._run_dir} is in use by another run, which holds {path}: wait for "
                "its end, or choose another run.dir."
            ) from None
        except OSError as error:
            # Some network file systems know no locks; a run that cannot start would help nobody.
            print(  # noqa: T201 - the user has to take over what the lock would do
                f"warning: {path} cannot be locked ({error.strerror}): make sure yourself that no "
                "other run uses this run.dir",
                file=sys.stderr,
            )
        self._file = file

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: IO[bytes]) -> None:
    """Takes the lock; waits for those who only ask for the state of a run and hold it for that."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
