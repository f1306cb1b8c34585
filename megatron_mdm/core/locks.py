"""Locks on files: one process holds a lock, and its end, of whatever kind, releases it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

from filelock import FileLock, Timeout

# `is_locked` takes the lock for a moment, so a taker tries again for so long.
_PATIENCE_SECONDS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockHeldError(Exception):
    """Another process holds the lock."""


class HeldLock:
    """A lock that this process takes, and holds until `release` or its own end.

    Args:
        path: File to lock; made when absent, in a folder that is there. It stays.

    Attributes:
        descriptors: Of the open file. A child that inherits it holds the lock after its parent's
            death. Empty where the file system knows no locks, and nothing is held.

    Raises:
        LockHeldError: Another process holds it.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.descriptors: list[int] = []
        self._lock = FileLock(
            path,
            timeout=_PATIENCE_SECONDS,
            thread_local=False,
            fallback_to_soft=False,
            on_acquired=self.descriptors.append,
        )
        try:
            self._lock.acquire()
        except Timeout:
            raise LockHeldError(str(path)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def release(self) -> None:
        """Releases the lock, also for children that inherited it. Idempotent."""
        self._lock.release()


def is_locked(path: Path) -> bool:
    """Does a live process hold a lock?

    Args:
        path: The lock's file, which need not exist.

    Returns:
        Whether one does; False where the file system knows no locks.
    """
    try:
        with path.open("rb") as file:
            # Shared, so that two processes that ask at once do not see each other as holders.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
