"""Extents: which stretch of which part stands where in a view's stream."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import whole_file
from megatron_mdm.data.stream import CHUNK_ITEMS, IntArray

BYTES_PER_EXTENT = 24
_NUM_SPOTS = 32


def extents_path(prefix: Path) -> Path:
    """Names the file of a view's extents.

    Args:
        prefix: The path of the view without extension.

    Returns:
        The prefix with `.extents.npy` after it.
    """
    return Path(f"{prefix}.extents.npy")


class Extents:
    """The stretches of a view, in the order of its stream. Each holds at least one token.

    Args:
        row_N3: int64 [N, 3]: token offset in the view, part number, token offset in the part.
        part_tokens: The tokens of each part.
        num_tokens: The tokens of the view.
        path: The file that the rows come from, for messages.

    Raises:
        DataError: A row at one of 32 spots spread over them contradicts its neighbour or its part.
    """

    def __init__(
        self, row_N3: IntArray, part_tokens: Sequence[int], num_tokens: int, path: Path
    ) -> None:
        self._row_N3 = row_N3
        self._offset_N = row_N3[:, 0]
        self._part_sizes = list(part_tokens)
        self._part_tokens = np.array(part_tokens, dtype=np.int64)
        self._num_tokens = num_tokens
        self._path = path
        if not len(row_N3) or row_N3[0, 0] != 0:
            raise self._damaged(0)
        num_spots = min(len(row_N3), _NUM_SPOTS)
        for spot in range(num_spots):
            place = spot * (len(row_N3) - 1) // max(num_spots - 1, 1)
            self._checked(place, place + 1)

    @classmethod
    def of_whole_parts(cls, part_tokens: Sequence[int], path: Path) -> Extents:
        """Makes the extents of a collection: all of every part, one after the other.

        Args:
            part_tokens: The tokens of each part, each at least 1.
            path: The view's file, for messages.

        Returns:
            One extent for each part.
        """
        ends = np.cumsum(part_tokens, dtype=np.int64)
        numbers = np.arange(len(ends))
        rows = np.stack([ends - part_tokens, numbers, np.zeros_like(ends)], axis=1)
        return cls(rows, part_tokens, int(ends[-1]), path)

    @classmethod
    def open(
        cls, path: Path, num_rows: int, part_tokens: Sequence[int], num_tokens: int
    ) -> Extents:
        """Maps a file of extents into memory.

        Args:
            path: The `.npy` file.
            num_rows: The extents that it has to hold.
            part_tokens: The tokens of each part.
            num_tokens: The tokens of the view.

        Returns:
            The extents.

        Raises:
            DataError: The file is missing, of another form, or contradicts the parts.
        """
        remedy = "make the subset again with tools/subset_data.py --overwrite."
        if not path.is_file():
            raise DataError(f"{path} does not exist: copy it to its view, or {remedy}")
        try:
            # Unlike np.load this opens no archives.
            rows = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:
            # A damaged header goes through Python's own parser, which raises many things.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path} is not an array of extents ({reason}): {remedy}") from error
        if rows.shape != (num_rows, 3) or rows.dtype != np.dtype("<i8"):
            raise DataError(
                f"{path} is an array of {rows.dtype} {list(rows.shape)} and the view needs int64 "
                f"[{num_rows}, 3]: {remedy}"
            )
        return cls(rows.view(np.ndarray), part_tokens, num_tokens, path)

    def locate(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """Finds what covers a stretch of the view.

        Args:
            start: Its first token, inside the view.
            length: Its tokens, at least 1; it ends inside the view.

        Returns:
            Part number, first token there and tokens of each piece, in order.

        Raises:
            DataError: The extents there are damaged.
        """
        stop = start + length
        first = max(bisect_right(self._offset_N, start) - 1, 0)
        last = bisect_left(self._offset_N, stop, lo=first + 1)
        if last - first > length:
            raise self._damaged(first)
        # A window covers few extents, for which plain integers are faster than arrays.
        rows = self._row_N3[first : last + 1].tolist()
        if last == len(self._row_N3):
            rows.append([self._num_tokens, 0, 0])
        pieces = []
        for number, ((offset, part, place), (end, _, _)) in enumerate(pairwise(rows), first):
            low, high = max(offset, start), min(end, stop)
            is_right = 0 <= offset <= low < high and end <= self._num_tokens
            is_right = is_right and 0 <= part < len(self._part_sizes) and place >= 0
            if not is_right or place + end - offset > self._part_sizes[part]:
                raise self._damaged(number)
            pieces.append((part, place + low - offset, high - low))
        if sum(count for _, _, count in pieces) != length:
            raise self._damaged(first)
        return pieces

    def locate_extents(self, number_N: IntArray) -> IntArray:
        """Gives whole extents by number.

        Args:
            number_N: int64 [N], each a number of an extent.

        Returns:
            int64 [N, 3]: part number, first token there, tokens.

        Raises:
            DataError: One of them is damaged.
        """
        row_N3 = self._row_N3[number_N]
        is_last_N = number_N == len(self._row_N3) - 1
        end_N = self._offset_N[np.where(is_last_N, 0, number_N + 1)]
        end_N[is_last_N] = self._num_tokens
        return self._located(row_N3, end_N, number_N)

    def locate_all(self) -> IntArray:
        """Gives all extents.

        Returns:
            int64 [N, 3]: part number, first token there, tokens.

        Raises:
            DataError: One of them is damaged.
        """
        return self._checked(0, len(self._row_N3))

    def lengths(self) -> Iterator[IntArray]:
        """Gives the tokens of all extents.

        Yields:
            int64 [count], chunk by chunk.

        Raises:
            DataError: An extent is damaged.
        """
        for start in range(0, len(self._row_N3), CHUNK_ITEMS):
            yield self._checked(start, min(start + CHUNK_ITEMS, len(self._row_N3)))[:, 2]

    def verify(self, sha256: str) -> None:
        """Checks all extents, in chunks.

        Args:
            sha256: What `ExtentsWriter.sha256` gave when they were written.

        Raises:
            DataError: An extent is damaged, or they are not those that were written.
        """
        for _ in self.lengths():
            pass
        digest = hashlib.sha256()
        for start in range(0, len(self._row_N3), CHUNK_ITEMS):
            digest.update(self._row_N3[start : start + CHUNK_ITEMS].tobytes())
        digest.update(str(self._num_tokens).encode())
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{self._path} is damaged: its extents are not those that were written: make the "
                "view again with the tool that made it, with --overwrite."
            )

    def _checked(self, first: int, stop: int) -> IntArray:
        row_N3 = np.array(self._row_N3[first:stop])
        after = int(self._offset_N[stop]) if stop < len(self._offset_N) else self._num_tokens
        return self._located(row_N3, np.append(row_N3[1:, 0], after), np.arange(first, stop))

    def _located(self, row_N3: IntArray, end_N: IntArray, number_N: IntArray) -> IntArray:
        offset_N, part_N, start_N = row_N3.T
        # Held against bounds before they are added or subtracted, which could overflow.
        wrong_N = (offset_N < 0) | (end_N <= offset_N) | (end_N > self._num_tokens)
        wrong_N |= (part_N < 0) | (part_N >= len(self._part_tokens)) | (start_N < 0)
        length_N = np.where(wrong_N, 0, end_N - offset_N)
        wrong_N |= start_N > self._part_tokens[np.where(wrong_N, 0, part_N)] - length_N
        if wrong_N.any():
            raise self._damaged(int(number_N[wrong_N.argmax()]))
        return np.stack([part_N, start_N, length_N], axis=1)

    def _damaged(self, number: int) -> DataError:
        return DataError(
            f"{self._path} is damaged: extent {number} does not follow from its neighbours or lies "
            "outside its part: make the view again with the tool that made it, with --overwrite."
        )


class ExtentsWriter:
    """Writes a file of extents one chunk after the other. Make it with `write_extents`.

    Attributes:
        num_rows: The extents written so far.
        num_tokens: The tokens that they hold.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        self._stream = stream
        self._digest = hashlib.sha256()
        self.write_header()

    def sha256(self) -> str:
        """Identifies the extents written so far, for `Extents.verify`.

        Returns:
            The SHA-256 in hexadecimal of all rows and the number of tokens.
        """
        digest = self._digest.copy()
        digest.update(str(self.num_tokens).encode())
        return digest.hexdigest()

    def write_header(self) -> None:
        """Writes the header with the number of rows so far, at the start of the file."""
        # NumPy pads headers so that an array can grow in place to any number of rows.
        np.lib.format.write_array_header_1_0(
            self._stream, {"descr": "<i8", "fortran_order": False, "shape": (self.num_rows, 3)}
        )

    def append(self, located_N3: IntArray) -> None:
        """Appends extents.

        Args:
            located_N3: int64 [N, 3]: part number, first token there, tokens, at least 1.
        """
        ends = located_N3[:, 2].cumsum() + self.num_tokens
        rows = np.stack([ends - located_N3[:, 2], located_N3[:, 0], located_N3[:, 1]], axis=1)
        content = rows.astype("<i8").tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self.num_rows += len(rows)
        self.num_tokens = int(ends[-1]) if len(ends) else self.num_tokens


@contextmanager
def write_extents(path: Path) -> Iterator[ExtentsWriter]:
    """Opens a file of extents that appears whole when the block ends well, or not at all.

    Args:
        path: The `.npy` file to create or replace.

    Yields:
        The writer.
    """
    with whole_file(path) as stream:
        writer = ExtentsWriter(stream)
        yield writer
        stream.seek(0)
        writer.write_header()
