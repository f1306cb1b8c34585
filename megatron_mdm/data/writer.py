"""Writes token shards: whole or not at all."""

from __future__ import annotations

import os
from array import array
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.shards import (
    CHUNK_ITEMS,
    DTYPES,
    HEADER,
    MAGIC,
    MAX_DOCUMENT_TOKENS,
    VERSION,
    bin_path,
    idx_path,
)
from megatron_mdm.errors import DataError
from megatron_mdm.files import temporary_sibling


class ShardWriter:
    """Writes documents to a pair of shards, one sequence a document; whole or not at all.

    Used as a context manager, it leaves nothing behind when the block ends without `finish`.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`. Its folder has to exist.
        dtype: The integer type of a token.

    Raises:
        DataError: The type is none that a shard can hold.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"{prefix}: a shard cannot hold tokens of type {self.dtype}: use uint16 or int32."
            )
        self._code = codes[0]
        self._prefix = prefix
        self._lengths = array("i")
        self.num_tokens = 0
        self._temporary_bin = temporary_sibling(bin_path(prefix))
        self._temporary_idx = temporary_sibling(idx_path(prefix))
        self._stream = self._temporary_bin.open("wb", buffering=1 << 20)

    @property
    def num_documents(self) -> int:
        """The documents added so far."""
        return len(self._lengths)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document.

        Args:
            tokens: Integer token ids, shape [length], length 0 or more.

        Raises:
            DataError: An id does not fit the shards' type, or the document is too long.
        """
        values = np.asarray(tokens)
        if values.size > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{self._prefix}: document {self.num_documents} has {values.size} tokens and a "
                f"shard's index counts up to {MAX_DOCUMENT_TOKENS}: split the document."
            )
        if values.dtype != self.dtype and values.size:
            limits = np.iinfo(self.dtype)
            low, high = int(values.min()), int(values.max())
            if low < limits.min or high > limits.max:
                raise DataError(
                    f"{self._prefix}: document {self.num_documents} holds token ids from {low} "
                    f"to {high}, which do not fit {self.dtype}: use a wider type."
                )
        self._stream.write(values.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(values.size)
        self.num_tokens += values.size

    def finish(self) -> None:
        """Makes both files appear under their names, `.idx` last.

        The index and the manifest of shards that are replaced go first, so that a process killed
        in between leaves shards that do not open, never shards that mix old and new.

        Raises:
            DataError: No token was added.
        """
        if not self.num_tokens:
            self.abort()
            raise DataError(
                f"{self._prefix}: the corpus has no tokens: give input with at least one "
                "document that is not empty."
            )
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._write_index()
        manifest_path(self._prefix).unlink(missing_ok=True)
        idx_path(self._prefix).unlink(missing_ok=True)
        self._temporary_bin.replace(bin_path(self._prefix))
        self._temporary_idx.replace(idx_path(self._prefix))

    def abort(self) -> None:
        """Removes the temporary files. Does nothing after `finish`."""
        # Closing flushes what is left, and a full disk refuses that too.
        with suppress(OSError):
            self._stream.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        with self._temporary_idx.open("wb") as stream:
            count = len(lengths)
            stream.write(HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
            for start in range(0, count, CHUNK_ITEMS):
                stream.write(lengths[start : start + CHUNK_ITEMS].astype("<i4").tobytes())
            offset_tokens = 0
            for start in range(0, count, CHUNK_ITEMS):
                ends = lengths[start : start + CHUNK_ITEMS].cumsum(dtype=np.int64)
                starts = np.concatenate(([0], ends[:-1])) + offset_tokens
                stream.write((starts * self.dtype.itemsize).astype("<i8").tobytes())
                offset_tokens += int(ends[-1])
            for start in range(0, count + 1, CHUNK_ITEMS):
                stop = min(start + CHUNK_ITEMS, count + 1)
                stream.write(np.arange(start, stop, dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
