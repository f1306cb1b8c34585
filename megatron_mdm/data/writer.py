"""Writes shards and their index. Whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import name_temporary
from megatron_mdm.data.extents import extents_path
from megatron_mdm.data.index import DTYPES, HEADER, MAGIC, MAX_DOCUMENT_TOKENS, VERSION
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.references import reference_path
from megatron_mdm.data.shards import TokenShards, bin_path, idx_path
from megatron_mdm.data.source import split_range

_LENGTH = np.dtype("<i4")
_COPY_BYTES = 1 << 30
# Shorter stretches are read and written; longer ones the system copies.
_SMALL_BYTES = 1 << 20
# What the system answers where it cannot copy between two files itself.
_NOT_SUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class GrowingShard:
    """The two files that grow while shards are made: all tokens, and every document's length.

    Nothing of the documents stays in memory. The files can be cut back to an earlier state and
    grown again.

    Args:
        tokens_path: The file of tokens, which becomes the shards' `.bin`; None where they stay in a
            file that is there, and only lengths are written.
        lengths_path: The file of lengths in tokens, 4 bytes per document.
        dtype: The integer type of a token.
        num_tokens: The tokens to keep of files that exist; what follows them is cut off.
        num_documents: The documents to keep.

    Raises:
        DataError: The type is none that a shard can hold, or the files are shorter than told.
    """

    def __init__(
        self,
        tokens_path: Path | None,
        lengths_path: Path,
        dtype: npt.DTypeLike,
        *,
        num_tokens: int = 0,
        num_documents: int = 0,
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if _dtype_code(self.dtype) is None:
            raise DataError(
                f"{tokens_path or lengths_path}: a shard cannot hold tokens of type {self.dtype}: "
                "use uint16 or int32."
            )
        self.num_tokens = num_tokens
        self.num_documents = num_documents
        self._files: list[BinaryIO] = []
        try:
            self._lengths = self._open(lengths_path, num_documents * _LENGTH.itemsize)
            self._tokens = (
                self._open(tokens_path, num_tokens * self.dtype.itemsize) if tokens_path else None
            )
        except BaseException:
            self.close()
            raise

    def append(self, tokens: npt.NDArray[np.integer], lengths: npt.ArrayLike) -> None:
        """Appends documents.

        Args:
            tokens: The tokens of all of them in a row, of the shards' type, shape [sum of lengths];
                not looked at where they stay elsewhere.
            lengths: The tokens of each, int32, shape [documents].
        """
        if self._tokens is not None:
            self._tokens.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._append_lengths(lengths)

    def append_stored(self, shards: TokenShards, first_token: int, lengths: npt.ArrayLike) -> None:
        """Appends documents of shards of the same type, their bytes as they are.

        Args:
            shards: The shards.
            first_token: The first token of the first document there.
            lengths: The tokens of each, shape [documents]; they follow each other.
        """
        num_tokens = int(np.sum(lengths, dtype=np.int64))
        if self._tokens is not None and num_tokens * self.dtype.itemsize >= _SMALL_BYTES:
            _copy_tokens(shards, first_token, num_tokens, self._tokens)
        elif self._tokens is not None:
            stored = shards.read_stored(first_token, first_token + num_tokens)
            self._tokens.write(stored.data)
        self._append_lengths(lengths)

    def sync(self) -> None:
        """Brings everything appended so far to the disk."""
        for stream in self._files:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Closes the files, bringing nothing more to the disk if it is full."""
        # Closing flushes what is left, which fails on a full disk.
        for stream in self._files:
            with suppress(OSError):
                stream.close()

    def _append_lengths(self, lengths: npt.ArrayLike) -> None:
        counts = np.asarray(lengths, dtype=_LENGTH)
        self._lengths.write(counts.data)
        self.num_tokens += int(counts.sum(dtype=np.int64))
        self.num_documents += counts.size

    def _open(self, path: Path, size_bytes: int) -> BinaryIO:
        stream = _open_at(path, size_bytes)
        self._files.append(stream)
        return stream


class ShardWriter:
    """Writes documents to a pair of shards, one sequence per document; whole or not at all.

    Used as a context manager, it leaves nothing behind when the block ends without `finish`.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`. Its folder has to exist.
        dtype: The integer type of a token.

    Raises:
        DataError: The type is none that a shard can hold.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix = prefix
        self._temporary_bin = name_temporary(bin_path(prefix))
        self._temporary_idx = name_temporary(idx_path(prefix))
        self._temporary_lengths = name_temporary(Path(f"{prefix}.lengths"))
        self._shard = GrowingShard(self._temporary_bin, self._temporary_lengths, dtype)
        self.dtype = self._shard.dtype
        self.append_stored = self._shard.append_stored

    @property
    def num_documents(self) -> int:
        """The documents added so far."""
        return self._shard.num_documents

    @property
    def num_tokens(self) -> int:
        """The tokens added so far."""
        return self._shard.num_tokens

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
        self._shard.append(values.astype(self.dtype, copy=False), [values.size])

    def finish(self, manifest: Manifest | None = None) -> None:
        """Makes the files appear under their names.

        Args:
            manifest: What is said of the shards.

        Raises:
            DataError: No token was added.
        """
        if not self.num_tokens:
            self.abort()
            raise DataError(
                f"{self._prefix}: the corpus has no tokens: give input with at least one "
                "document that is not empty."
            )
        self._shard.sync()
        write_index(self._temporary_idx, self._temporary_lengths, self.num_documents, self.dtype)
        publish_shards(self._prefix, self._temporary_bin, self._temporary_idx, manifest)
        self.abort()

    def abort(self) -> None:
        """Removes the temporary files. After `finish` there are none."""
        self._shard.close()
        for path in (self._temporary_bin, self._temporary_idx, self._temporary_lengths):
            path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def write_index(path: Path, lengths_path: Path, num_documents: int, dtype: npt.DTypeLike) -> None:
    """Writes the index of shards whose documents are all appended and synced.

    Args:
        path: The file to write; it is whole when this returns.
        lengths_path: The file of lengths of a `GrowingShard`.
        num_documents: The documents.
        dtype: The integer type of a token.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    with path.open("wb") as stream:
        stream.write(
            HEADER.pack(MAGIC, VERSION, _dtype_code(kind), num_documents, num_documents + 1)
        )
        for lengths in _read_lengths(lengths_path, num_documents):
            stream.write(lengths.tobytes())
        offset_tokens = 0
        for lengths in _read_lengths(lengths_path, num_documents):
            ends = lengths.cumsum(dtype=np.int64) + offset_tokens
            stream.write(((ends - lengths) * kind.itemsize).astype("<i8").tobytes())
            offset_tokens = int(ends[-1])
        for start, stop in split_range(num_documents + 1):
            stream.write(np.arange(start, stop, dtype="<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def publish_shards(
    prefix: Path,
    tokens: Path,
    index: Path,
    manifest: Manifest | None,
    *,
    are_referred_to: bool = False,
) -> None:
    """Gives finished files their names; killed anywhere, it can be called again.

    The manifest and the index of what is replaced go first, and the new ones come last, so that a
    process killed in between leaves shards that do not open, never shards that mix old and new.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`. What is there is replaced.
        tokens: The file of tokens, or a reference to it. If it is gone, an earlier call moved it
            already.
        index: The index, in the same file system.
        manifest: What is said of the shards.
        are_referred_to: Whether `tokens` is a reference.
    """
    name, other = bin_path(prefix), reference_path(prefix)
    if are_referred_to:
        name, other = other, name
    for path in (manifest_path(prefix), idx_path(prefix), extents_path(prefix), other):
        path.unlink(missing_ok=True)
    if tokens.exists():
        tokens.replace(name)
    index.replace(idx_path(prefix))
    if manifest is not None:
        manifest.write(manifest_path(prefix))


def damaged_since(path: Path, found_bytes: int, counted_bytes: int) -> DataError:
    """Says that a file of a job is not as the job left it.

    Args:
        path: The file.
        found_bytes: Its size.
        counted_bytes: The size that the job's journal counts.

    Returns:
        The error to raise.
    """
    return DataError(
        f"{path} has {found_bytes} bytes and its journal counts {counted_bytes}: it was damaged "
        "after it was written; start again with --overwrite."
    )


def _dtype_code(dtype: np.dtype[Any]) -> int | None:
    return next((code for code, known in DTYPES.items() if known == dtype), None)


def _read_lengths(path: Path, num_documents: int) -> Iterator[npt.NDArray[np.int32]]:
    with path.open("rb") as stream:
        for start, stop in split_range(num_documents):
            yield np.fromfile(stream, dtype=_LENGTH, count=stop - start)


def _open_at(path: Path, size_bytes: int) -> BinaryIO:
    """Opens a file to append to, cut back to a size."""
    if not size_bytes:
        return path.open("wb", buffering=1 << 20)
    found_bytes = path.stat().st_size if path.exists() else 0
    if found_bytes < size_bytes:
        raise damaged_since(path, found_bytes, size_bytes)
    stream = path.open("r+b", buffering=1 << 20)
    stream.truncate(size_bytes)
    stream.seek(size_bytes)
    return stream


def _copy_tokens(shards: TokenShards, first_token: int, num_tokens: int, out: BinaryIO) -> None:
    """Copies stored tokens within the system's kernel, or within the file system where it can."""
    out.flush()
    with shards.tokens_path.open("rb", buffering=0) as source:
        source.seek(shards.place_bytes(first_token))
        left_bytes = num_tokens * shards.dtype.itemsize
        try:
            while left_bytes:
                count = min(left_bytes, _COPY_BYTES)
                copied = os.copy_file_range(source.fileno(), out.fileno(), count)
                if not copied:
                    break
                left_bytes -= copied
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        # Both files stand where the kernel stopped: the rest is copied here.
        while left_bytes and (block := source.read(min(left_bytes, 1 << 20))):
            out.write(block)
            left_bytes -= len(block)
