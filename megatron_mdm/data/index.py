"""The index of token shards, `.idx`: read in constant time, checked wholly on request."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.source import IntArray, split_range, spread_blocks

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOAT_DTYPES = {6: "float64", 7: "float32"}
MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max
REMEDY = "write the shards again with mdm prepare --overwrite."
_NUM_SPOTS = 32


def check_size(
    path: Path,
    actual_bytes: int,
    expected_bytes: int,
    content: str,
    remedy: str = f"copy it again or {REMEDY}",
) -> None:
    """Checks the size of a file.

    Args:
        path: The file, for the message.
        actual_bytes: Its size.
        expected_bytes: The size that it should have.
        content: What takes that size, for the message.
        remedy: What to do about another size.

    Raises:
        DataError: The sizes differ.
    """
    if actual_bytes != expected_bytes:
        state = "truncated" if actual_bytes < expected_bytes else "too long"
        raise DataError(
            f"{path} is {state}: it has {actual_bytes} bytes and {content} take "
            f"{expected_bytes}: {remedy}"
        )


class ShardIndex:
    """The index of a pair of shards. Opening it takes constant time and memory.

    Everything in the file may be wrong: the counts of the header are held against the file's size
    before they are used, and 32 places spread over the index against their neighbours.

    Args:
        path: The `.idx` file.

    Attributes:
        path: The `.idx` file.
        dtype: The integer type of a token.
        num_sequences: The sequences.
        num_documents: The documents; each is one or more sequences, or none.
        num_tokens: The tokens of all sequences.

    Raises:
        DataError: The file is truncated, too long, of another format, or visibly damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = PositionalFile(path)
        self.dtype, self.num_sequences, self._num_indices = _read_header(self._file)
        self._offsets_at = HEADER.size + 4 * self.num_sequences
        self._indices_at = HEADER.size + 12 * self.num_sequences
        check_size(
            path,
            self._file.size_bytes,
            self._indices_at + 8 * self._num_indices,
            f"{self.num_sequences} sequences, {self._num_indices} document indices",
        )
        self.num_documents = self._num_indices - 1
        self.num_tokens = self._count_tokens_by_spots()
        self._check_index_spots()

    def verify(self) -> None:
        """Checks every length, offset and document index, in chunks.

        Raises:
            DataError: The index is damaged, or a document is longer than datasets can say.
        """
        num_tokens = 0
        for start, stop in split_range(self.num_sequences):
            lengths = self._read_lengths(start, stop - start)
            ends = num_tokens + lengths.cumsum(dtype=np.int64)
            expected_offsets = (ends - lengths) * self.dtype.itemsize
            wrong = (lengths < 0) | (self._read_offsets(start, stop - start) != expected_offsets)
            # Beyond what the .bin file holds, the sums could overflow as well.
            wrong |= ends > self.num_tokens
            if wrong.any():
                raise self._wrong_sequence_error(start + int(wrong.argmax()))
            num_tokens = int(ends[-1])
        for start, stop in split_range(self.num_documents):
            lengths = self.locate_documents(np.arange(start, stop))[:, 1]
            if lengths.max() > MAX_DOCUMENT_TOKENS:
                document = int(lengths.argmax())
                raise DataError(
                    f"{self.path}: document {start + document} has {lengths[document]} tokens, "
                    f"over {MAX_DOCUMENT_TOKENS}: split it."
                )

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """Finds documents in the stream.

        Args:
            document_N: int64 [N], each in 0..num_documents-1.

        Returns:
            int64 [N, 2]: first token, tokens.

        Raises:
            DataError: The index is damaged at one of them.
        """
        indices = self._map_indices()
        first_N, last_N = indices[document_N], indices[document_N + 1]
        # Compared, because a difference of damaged values can overflow.
        if ((first_N < 0) | (last_N < first_N) | (last_N > self.num_sequences)).any():
            raise self._wrong_indices_error()
        start_N, stop_N = self._find_token_starts(first_N), self._find_token_starts(last_N)
        wrong_N = (start_N < 0) | (stop_N < start_N) | (stop_N > self.num_tokens)
        if wrong_N.any():
            raise DataError(
                f"{self.path} is damaged: document {int(document_N[wrong_N.argmax()])} does not "
                f"lie within the {self.num_tokens} tokens: {REMEDY}"
            )
        return np.stack([start_N, stop_N - start_N], axis=1)

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds the documents that hold tokens, in time that grows with N alone.

        Args:
            token_N: int64 [N], each in 0..num_tokens-1.

        Returns:
            int64 [N], numbers of documents.
        """
        # Of several documents that begin at one token all but the last are empty.
        sequence_N = find_last_at_most(self._map_offsets(), token_N * self.dtype.itemsize)
        return find_last_at_most(self._map_indices(), sequence_N)

    def _map_offsets(self) -> IntArray:
        return self._file.map("<i8", self._offsets_at, self.num_sequences)

    def _map_indices(self) -> IntArray:
        return self._file.map("<i8", self._indices_at, self._num_indices)

    def _read_lengths(self, start: int, count: int) -> IntArray:
        return self._file.read("<i4", HEADER.size + 4 * start, count).astype(np.int64)

    def _read_offsets(self, start: int, count: int) -> IntArray:
        return self._file.read("<i8", self._offsets_at + 8 * start, count)

    def _read_indices(self, start: int, count: int) -> IntArray:
        return self._file.read("<i8", self._indices_at + 8 * start, count)

    def _count_tokens_by_spots(self) -> int:
        """Returns the number of tokens, from the last sequence."""
        end_bytes = 0
        for sequence in _spread_spots(self.num_sequences):
            num_after = min(2, self.num_sequences - sequence)
            offset, *following = self._read_offsets(sequence, num_after).tolist()
            length = int(self._read_lengths(sequence, 1)[0])
            end_bytes = offset + length * self.dtype.itemsize
            if (
                length < 0
                or offset < 0
                or offset % self.dtype.itemsize
                or (not sequence and offset)
            ):
                raise self._wrong_sequence_error(sequence)
            if following and following[0] != end_bytes:
                raise self._wrong_sequence_error(sequence + 1)
        return end_bytes // self.dtype.itemsize

    def _check_index_spots(self) -> None:
        ends = [int(self._read_indices(at, 1)[0]) for at in (0, self.num_documents)]
        if ends != [0, self.num_sequences]:
            raise DataError(
                f"{self.path} is damaged: its document indices do not run from 0 to the "
                f"{self.num_sequences} sequences: {REMEDY}"
            )
        for document in _spread_spots(self.num_documents):
            first, last = self._read_indices(document, 2).tolist()
            if not 0 <= first <= last <= self.num_sequences:
                raise self._wrong_indices_error()

    def _find_token_starts(self, sequence_N: IntArray) -> IntArray:
        """Returns where sequences start, in tokens; the number of sequences gives the end."""
        start_N = np.full(len(sequence_N), self.num_tokens, dtype=np.int64)
        inside_N = sequence_N < self.num_sequences
        start_N[inside_N] = self._map_offsets()[sequence_N[inside_N]] // self.dtype.itemsize
        return start_N

    def _wrong_indices_error(self) -> DataError:
        return DataError(
            f"{self.path} is damaged: its document indices decrease or lie beyond its "
            f"sequences: {REMEDY}"
        )

    def _wrong_sequence_error(self, sequence: int) -> DataError:
        return DataError(
            f"{self.path} is damaged: sequence {sequence} has a length or an offset that does not "
            f"follow from the sequences before it: {REMEDY}"
        )


def find_last_at_most(ascending: IntArray, value_N: IntArray) -> IntArray:
    """Finds the last place of each value or less, reading few places of a mapped file.

    Args:
        ascending: int64 [M], of which np.searchsorted would copy a map whole.
        value_N: int64 [N], each at least the first element.

    Returns:
        int64 [N], each in 0..M-1.
    """
    low_N = np.zeros(len(value_N), dtype=np.int64)
    high_N = np.full(len(value_N), len(ascending), dtype=np.int64)
    while ((high_N - low_N) > 1).any():
        middle_N = (low_N + high_N) // 2
        is_after_N = ascending[middle_N] > value_N
        high_N = np.where(is_after_N, middle_N, high_N)
        low_N = np.where(is_after_N, low_N, middle_N)
    return low_N


def _spread_spots(count: int) -> list[int]:
    """Returns up to 32 places in 0..count-1, the first and the last among them, in order."""
    return spread_blocks(count, 1, _NUM_SPOTS) if count else []


def _read_header(file: PositionalFile) -> tuple[np.dtype[Any], int, int]:
    path = file.path
    header = file.read(np.uint8, 0, min(HEADER.size, file.size_bytes)).tobytes()
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise DataError(
            f"{path} starts with {header[: len(MAGIC)]!r} instead of {MAGIC!r}, so it is no "
            "index of token shards: give shards made by mdm prepare or Megatron."
        )
    if len(header) < HEADER.size:
        check_size(path, len(header), HEADER.size, "its header alone would")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(
            f"{path} has format version {version} and only {VERSION} is known: {REMEDY}"
        )
    if code not in DTYPES:
        told = f"{code} ({_FLOAT_DTYPES[code]})" if code in _FLOAT_DTYPES else str(code)
        known = ", ".join(f"{key} ({dtype.name})" for key, dtype in DTYPES.items())
        raise DataError(f"{path} has dtype code {told} and tokens need one of {known}: {REMEDY}")
    if not num_indices:
        raise DataError(f"{path} is damaged: it has no document index: {REMEDY}")
    return DTYPES[code], num_sequences, num_indices
