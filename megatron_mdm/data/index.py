"""The index of token shards, `.idx`: read in constant time, checked wholly on request."""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.stream import CHUNK_ITEMS, IntArray, PositionalFile

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
REMEDY = "write the shards again with tools/preprocess_data.py --overwrite."
_NUM_SPOTS = 32


def check_size(path: Path, actual_bytes: int, expected_bytes: int, content: str) -> None:
    """Checks the size of a file.

    Args:
        path: The file, for the message.
        actual_bytes: Its size.
        expected_bytes: The size that it should have.
        content: What takes that size, for the message.

    Raises:
        DataError: The sizes differ.
    """
    if actual_bytes != expected_bytes:
        state = "truncated" if actual_bytes < expected_bytes else "too long"
        raise DataError(
            f"{path} is {state}: it has {actual_bytes} bytes and {content} take "
            f"{expected_bytes}: copy it again or {REMEDY}"
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
        self.num_tokens = self._tokens_by_spots()
        self._check_index_spots()

    def verify(self) -> None:
        """Checks every length, offset and document index, in chunks.

        Raises:
            DataError: The index is damaged, or a document is longer than datasets can say.
        """
        num_tokens = 0
        for start in range(0, self.num_sequences, CHUNK_ITEMS):
            count = min(CHUNK_ITEMS, self.num_sequences - start)
            lengths = self._lengths(start, count)
            ends = num_tokens + lengths.cumsum(dtype=np.int64)
            expected_offsets = (ends - lengths) * self.dtype.itemsize
            wrong = (lengths < 0) | (self._offsets(start, count) != expected_offsets)
            # Beyond what the .bin file holds, the sums could overflow as well.
            wrong |= ends > self.num_tokens
            if wrong.any():
                raise self._wrong_sequence(start + int(wrong.argmax()))
            num_tokens = int(ends[-1])
        for start in range(0, self.num_documents, CHUNK_ITEMS):
            self._document_bounds(start, min(CHUNK_ITEMS, self.num_documents - start))

    @property
    def document_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [num_documents].

        Where every document is one sequence this maps the file, otherwise it is computed.

        Raises:
            DataError: The document indices are damaged.
        """
        if self._has_sequence_for_document():
            return self._file.map("<i4", HEADER.size, self.num_sequences)
        return self._computed_lengths

    @cached_property
    def _computed_lengths(self) -> npt.NDArray[np.int32]:
        lengths = np.empty(self.num_documents, dtype=np.int32)
        for start in range(0, self.num_documents, CHUNK_ITEMS):
            count = min(CHUNK_ITEMS, self.num_documents - start)
            lengths[start : start + count] = np.diff(self._document_bounds(start, count))
        return lengths

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """Finds documents in the stream.

        Args:
            document_N: int64 [N], each in 0..num_documents-1.

        Returns:
            int64 [N, 2]: first token, tokens.

        Raises:
            DataError: The index is damaged at one of them.
        """
        indices = self._file.map("<i8", self._indices_at, self._num_indices)
        start_N = self._token_starts(indices[document_N])
        length_N = self._token_starts(indices[document_N + 1]) - start_N
        wrong = (start_N < 0) | (length_N < 0) | (start_N + length_N > self.num_tokens)
        if wrong.any():
            raise DataError(
                f"{self.path} is damaged: document {int(document_N[wrong.argmax()])} does not lie "
                f"within the {self.num_tokens} tokens: {REMEDY}"
            )
        return np.stack([start_N, length_N], axis=1)

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds the documents that hold tokens, in time that grows with N alone.

        Args:
            token_N: int64 [N], each in 0..num_tokens-1.

        Returns:
            int64 [N], numbers of documents.
        """
        offsets = self._file.map("<i8", self._offsets_at, self.num_sequences)
        indices = self._file.map("<i8", self._indices_at, self._num_indices)
        # Where several begin at one token all but the last are empty.
        return _last_at_most(indices, _last_at_most(offsets, token_N * self.dtype.itemsize))

    def _lengths(self, start: int, count: int) -> npt.NDArray[np.int32]:
        return self._file.read("<i4", HEADER.size + 4 * start, count)

    def _offsets(self, start: int, count: int) -> IntArray:
        return self._file.read("<i8", self._offsets_at + 8 * start, count)

    def _indices(self, start: int, count: int) -> IntArray:
        return self._file.read("<i8", self._indices_at + 8 * start, count)

    def _tokens_by_spots(self) -> int:
        """Returns the number of tokens, from the last sequence."""
        end_bytes = 0
        for sequence in _spots(self.num_sequences):
            num_after = min(2, self.num_sequences - sequence)
            offset, *following = self._offsets(sequence, num_after).tolist()
            length = int(self._lengths(sequence, 1)[0])
            end_bytes = offset + length * self.dtype.itemsize
            if (
                length < 0
                or offset < 0
                or offset % self.dtype.itemsize
                or (not sequence and offset)
            ):
                raise self._wrong_sequence(sequence)
            if following and following[0] != end_bytes:
                raise self._wrong_sequence(sequence + 1)
        return end_bytes // self.dtype.itemsize

    def _check_index_spots(self) -> None:
        ends = [int(self._indices(at, 1)[0]) for at in (0, self.num_documents)]
        if ends != [0, self.num_sequences]:
            raise DataError(
                f"{self.path} is damaged: its document indices do not run from 0 to the "
                f"{self.num_sequences} sequences: {REMEDY}"
            )
        for document in _spots(self.num_documents):
            self._check_indices(self._indices(document, 2))

    def _check_indices(self, indices: IntArray) -> None:
        # Compared and not subtracted, which can overflow.
        if (indices[1:] < indices[:-1]).any() or indices[0] < 0 or indices[-1] > self.num_sequences:
            raise DataError(
                f"{self.path} is damaged: its document indices decrease or lie beyond its "
                f"sequences: {REMEDY}"
            )

    def _document_bounds(self, start: int, count: int) -> IntArray:
        """Returns the first tokens of documents and the end of the last, int64 [count + 1]."""
        indices = self._indices(start, count + 1)
        self._check_indices(indices)
        bounds = self._token_starts(indices)
        lengths = np.diff(bounds)
        too_long = lengths > MAX_DOCUMENT_TOKENS
        if too_long.any():
            document = int(too_long.argmax())
            raise DataError(
                f"{self.path}: document {start + document} has {int(lengths[document])} tokens, "
                f"over {MAX_DOCUMENT_TOKENS}: split it."
            )
        return bounds

    def _token_starts(self, sequence_N: IntArray) -> IntArray:
        """Returns where sequences start, in tokens; the number of sequences gives the end."""
        if ((sequence_N < 0) | (sequence_N > self.num_sequences)).any():
            raise DataError(
                f"{self.path} is damaged: its document indices decrease or lie beyond its "
                f"sequences: {REMEDY}"
            )
        start_N = np.full(len(sequence_N), self.num_tokens, dtype=np.int64)
        inside_N = sequence_N < self.num_sequences
        offsets = self._file.map("<i8", self._offsets_at, self.num_sequences)
        start_N[inside_N] = offsets[sequence_N[inside_N]] // self.dtype.itemsize
        return start_N

    def _has_sequence_for_document(self) -> bool:
        if self.num_documents != self.num_sequences:
            return False
        for start in range(0, self._num_indices, CHUNK_ITEMS):
            count = min(CHUNK_ITEMS, self._num_indices - start)
            if (self._indices(start, count) != np.arange(start, start + count)).any():
                return False
        return True

    def _wrong_sequence(self, sequence: int) -> DataError:
        return DataError(
            f"{self.path} is damaged: sequence {sequence} has a length or an offset that does not "
            f"follow from the sequences before it: {REMEDY}"
        )


def _last_at_most(ascending: IntArray, value_N: IntArray) -> IntArray:
    """The last place of each value or less; np.searchsorted would copy an unaligned map whole."""
    low_N = np.zeros(len(value_N), dtype=np.int64)
    high_N = np.full(len(value_N), len(ascending), dtype=np.int64)
    while ((high_N - low_N) > 1).any():
        middle_N = (low_N + high_N) // 2
        is_after_N = ascending[middle_N] > value_N
        high_N = np.where(is_after_N, middle_N, high_N)
        low_N = np.where(is_after_N, low_N, middle_N)
    return low_N


def _spots(count: int) -> list[int]:
    """Returns up to 32 places in 0..count-1, the first and the last among them, in order."""
    num_spots = min(count, _NUM_SPOTS)
    return sorted({spot * (count - 1) // max(num_spots - 1, 1) for spot in range(num_spots)})


def _read_header(file: PositionalFile) -> tuple[np.dtype[Any], int, int]:
    path = file.path
    header = file.read(np.uint8, 0, min(HEADER.size, file.size_bytes)).tobytes()
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise DataError(
            f"{path} starts with {header[: len(MAGIC)]!r} instead of {MAGIC!r}, so it is no "
            "index of token shards: give shards made by tools/preprocess_data.py or Megatron."
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
