"""One run per folder at a time."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.locks import HeldLock, LockHeldError
from megatron_mdm.core.remarks import warn

LOCK_FILE_NAME = "lock"


class RunLock:
    """Holds `run.dir/lock` from the first call of `acquire` until `release`.

    The kernel gives the lock back when the process ends, however it ends: a lock cannot be left
    behind. Entering the context locks a folder that is there; a new one is not made before
    `acquire`.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock: HeldLock | None = None

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
        if self._lock is not None:
            return
        path = self._run_dir / LOCK_FILE_NAME
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = HeldLock(path)
        except LockHeldError:
            raise ConfigError(
                f"run.dir={self._run_dir} is in use by another run, which holds {path}: wait for "
                "its end, or choose another run.dir."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir={self._run_dir} cannot be written ({error.strerror}): choose another "
                "folder."
            ) from None
        if not self._lock.descriptors:
            # Some network file systems know no locks; a run that cannot start would help nobody.
            warn(
                f"{path} cannot be locked: make sure yourself that no other run uses this run.dir."
            )

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
