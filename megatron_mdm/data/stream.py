"""Streams of tokens: what shards and views offer alike, and reading files by position."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import weakref
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.manifest import Manifest

IntArray = npt.NDArray[np.int64]

CHUNK_ITEMS = 1 << 20
_NUM_BLOCKS = 1024
_BLOCK_TOKENS = 512
# A view may have more parts than a process may have open files: leave it three quarters of them.
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MAX_OPEN_FILES = 4096 if _LIMIT == resource.RLIM_INFINITY else min(_LIMIT // 2, 4096)
_MAX_MAPS = max(1, _MAX_OPEN_FILES // 2)


class TokenSource(Protocol):
    """A stream of tokens of documents, one after the other: token shards or a view over some.

    Safe to read from several threads at once. Pickles as its path.
    """

    @property
    def prefix(self) -> Path:
        """The path without extension."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type of a token on disk."""

    @property
    def num_documents(self) -> int:
        """The documents."""

    @property
    def num_tokens(self) -> int:
        """The tokens of all documents."""

    @property
    def manifest(self) -> Manifest | None:
        """How the tokens were made; None for shards without a manifest."""

    @property
    def parts(self) -> tuple[TokenSource, ...]:
        """The pairs of shards that hold the tokens."""

    @property
    def document_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [num_documents]; found on first use."""

    def read(self, start: int, length: int) -> IntArray:
        """Copies `length` tokens from token `start` on; int64 [length]."""

    def read_into(self, start: int, out: IntArray) -> None:
        """Fills `out`, int64 [length], with the tokens from token `start` on."""

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """Finds documents; int64 [N, 3]: number in `parts`, first token there, tokens."""

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds what holds tokens; int64 [N, 2]: number in `parts`, document there."""

    def locate_extents(self) -> IntArray:
        """The stretches of the stream; int64 [N, 3]: number in `parts`, first token, tokens."""

    def find_token_outside(self, limit: int, reserved: int | None = None) -> tuple[int, int] | None:
        """Position and id of the first id below 0, of at least `limit`, or `reserved`; or None."""

    def fingerprint(self) -> str:
        """Identifies the stream by its content, as `stream_fingerprint` does."""

    def verify(self) -> None:
        """Checks all of the index, in time proportional to the documents."""


def check_range(source: TokenSource, start: int, length: int) -> None:
    """Checks that a part of a stream lies inside it.

    Args:
        source: The stream.
        start: The first token.
        length: The number of tokens.

    Raises:
        IndexError: The part reaches outside the stream.
    """
    if start < 0 or length < 0 or start + length > source.num_tokens:
        raise IndexError(
            f"tokens {start} to {start + length} of {source.prefix} with {source.num_tokens}"
        )


def stream_fingerprint(source: TokenSource, num_blocks: int = _NUM_BLOCKS) -> str:
    """Identifies a stream by content, whatever files hold it: cheap at any size.

    Args:
        source: The stream.
        num_blocks: At most so many blocks are read, at least 1.

    Returns:
        The SHA-256 in hexadecimal of the numbers of tokens and documents and of blocks of 512
        tokens that are spread evenly over the stream, its start and its end among them.
    """
    digest = hashlib.sha256(f"{source.num_tokens} {source.num_documents}".encode())
    length = min(_BLOCK_TOKENS, source.num_tokens)
    last = source.num_tokens - length
    starts = sorted({block * last // max(num_blocks - 1, 1) for block in range(num_blocks)})
    if len(starts) * length >= source.num_tokens:
        # The blocks of a short stream overlap: it is read once instead of many times over.
        whole = source.read(0, source.num_tokens)
        blocks = (whole[start : start + length] for start in starts)
    else:
        blocks = (source.read(start, length) for start in starts)
    for block in blocks:
        digest.update(block.tobytes())
    return digest.hexdigest()


class StreamMethods:
    """What every stream can do that is read by `read_into`."""

    def read(self: TokenSource, start: int, length: int) -> IntArray:
        """Copies a part of the stream.

        Args:
            start: The first token, 0 or more.
            length: The number of tokens, 0 or more.

        Returns:
            The token ids, int64, shape [length].

        Raises:
            IndexError: The part reaches outside the stream.
            DataError: A file is damaged or has become shorter, or the storage fails.
        """
        check_range(self, start, length)
        out = np.empty(length, dtype=np.int64)
        self.read_into(start, out)
        return out

    def find_token_outside(
        self: TokenSource, limit: int, reserved: int | None = None
    ) -> tuple[int, int] | None:
        """Looks through the whole stream for a token id that a vocabulary does not have.

        Args:
            limit: The smallest id that is too large; those below 0 are found as well.
            reserved: An id that text may not hold either.

        Returns:
            The position in tokens and the id of the first one, or None.
        """
        for start in range(0, self.num_tokens, CHUNK_ITEMS):
            chunk = self.read(start, min(CHUNK_ITEMS, self.num_tokens - start))
            wrong = (chunk < 0) | (chunk >= limit)
            if reserved is not None:
                wrong |= chunk == reserved
            found = np.flatnonzero(wrong)
            if found.size:
                return start + int(found[0]), int(chunk[found[0]])
        return None

    def fingerprint(self) -> str:
        """Identifies the stream by its content.

        Returns:
            What `stream_fingerprint` gives: equal for equal streams in other files. The tokens are
            read the first time.
        """
        return self._content

    @cached_property
    def _content(self) -> str:
        return stream_fingerprint(cast(TokenSource, self))


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
            raise self._unreadable(error) from error
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
            raise self._unreadable(error, offset_bytes + done) from error

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
            raise self._unreadable(error, offset_bytes) from error
        except ValueError as error:
            raise DataError(
                f"{self.path} cannot be mapped into memory ({error}): copy it again."
            ) from error

    def _unreadable(self, error: OSError, offset_bytes: int = 0) -> DataError:
        remedy = "check the storage and the file's permissions."
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "allow the process more open files with ulimit -n."
        return DataError(
            f"{self.path} cannot be read at byte {offset_bytes} ({error.strerror}): {remedy}"
        )
