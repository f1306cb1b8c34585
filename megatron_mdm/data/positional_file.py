"""Files that are read by position, from any thread."""

from __future__ import annotations

import errno
import os
import resource
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError

# A view may have more parts than a process may have open files, so that few are kept open: at most
# half of the limit as descriptors, and a quarter as maps.
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MAX_OPEN_FILES = 4096 if _LIMIT == resource.RLIM_INFINITY else min(_LIMIT // 2, 4096)
_MAX_MAPS = max(1, _MAX_OPEN_FILES // 2)


class _Identity(NamedTuple):
    device: int
    inode: int
    size_bytes: int


class _Descriptor:
    """An open file that is closed when the last reader has let go of it."""

    def __init__(self, path: Path, identity: _Identity | None) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)
        state = os.fstat(self.number)
        self.identity = _Identity(state.st_dev, state.st_ino, state.st_size)
        if identity is not None and self.identity != identity:
            raise DataError(
                f"{path} was replaced while it was in use: end the processes that read it before "
                "it is written again, and start anew."
            )


_descriptor = lru_cache(maxsize=_MAX_OPEN_FILES)(_Descriptor)


@lru_cache(maxsize=_MAX_MAPS)
def _map(
    path: Path, identity: _Identity, dtype: str, offset_bytes: int, count: int
) -> npt.NDArray[Any]:
    """Maps a part of a file; a map holds a descriptor, so that few are kept."""
    _Descriptor(path, identity)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset_bytes, shape=(count,)).view(
        np.ndarray
    )


class PositionalFile:
    """A file that is read by position, from any thread.

    A memory map would be about as fast, but ends the process by a signal when the file gets
    shorter or the storage fails.

    Args:
        path: The file.

    Attributes:
        path: The file.
        size_bytes: Its size when it was opened.

    Raises:
        DataError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._identity = _Descriptor(path, None).identity
        except OSError as error:
            raise self._unreadable_error(error) from error
        self.size_bytes = self._identity.size_bytes

    def fill(self, out: npt.NDArray[Any], offset_bytes: int) -> None:
        """Fills an array with the bytes at a place of the file.

        Args:
            out: Contiguous, shape [count].
            offset_bytes: The place.

        Raises:
            DataError: The file ends before, or the storage fails.
        """
        if not out.size:
            return
        raw = out.view(np.uint8).data
        done = 0
        try:
            opened = _descriptor(self.path, self._identity)
            while done < len(raw):
                count = os.preadv(opened.number, [raw[done:]], offset_bytes + done)
                if not count:
                    raise DataError(
                        f"{self.path} ends at byte {offset_bytes + done}, within what is to be "
                        f"read, and had {self.size_bytes} bytes when it was opened: it was "
                        "truncated; copy it again or write it anew."
                    )
                done += count
        except OSError as error:
            raise self._unreadable_error(error, offset_bytes + done) from error

    def read(self, dtype: npt.DTypeLike, offset_bytes: int, count: int) -> npt.NDArray[Any]:
        """Reads an array.

        Args:
            dtype: Its type.
            offset_bytes: Where it starts.
            count: The number of items.

        Returns:
            A new array, shape [count].

        Raises:
            DataError: The file ends before, or the storage fails.
        """
        values = np.empty(count, dtype)
        self.fill(values, offset_bytes)
        return values

    def map(self, dtype: npt.DTypeLike, offset_bytes: int, count: int) -> npt.NDArray[Any]:
        """Maps an array into memory, for tools; a run reads with `fill`.

        Args:
            dtype: Its type.
            offset_bytes: Where it starts.
            count: The number of items.

        Returns:
            A read-only view of the file, shape [count].

        Raises:
            DataError: The file cannot be mapped.
        """
        if not count:
            return np.empty(0, dtype)
        try:
            return _map(self.path, self._identity, np.dtype(dtype).str, offset_bytes, count)
        except OSError as error:
            raise self._unreadable_error(error, offset_bytes) from error
        except ValueError as error:
            raise DataError(
                f"{self.path} cannot be mapped into memory ({error}): copy it again."
            ) from error

    def _unreadable_error(self, error: OSError, offset_bytes: int = 0) -> DataError:
        remedy = "check the storage and the file's permissions."
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "allow the process more open files with ulimit -n."
        return DataError(
            f"{self.path} cannot be read at byte {offset_bytes} ({error.strerror}): {remedy}"
        )
