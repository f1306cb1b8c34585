"""Extents: which stretch of which part stands where in a stream of tokens."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_mdm.core.errors import DataError, first_line
from megatron_mdm.data.index import find_last_at_most
from megatron_mdm.data.source import IntArray, split_range

_NUM_SPOTS = 32


def extents_path(prefix: Path) -> Path:
    """Names the file of a subset's extents: PREFIX.extents.npy."""
    return Path(f"{prefix}.extents.npy")


class Extents:
    """The stretches of a stream, in its order. Each holds at least one token.

    Args:
        row_N3: int64 [N, 3]: token offset in the stream, part number, token offset in the part.
        part_tokens: The tokens of each part.
        num_tokens: The tokens of the stream.
        path: The file that the rows come from, for messages.

    Raises:
        DataError: A row at one of 32 spots spread over them contradicts its neighbour or its part.
    """

    def __init__(
        self, row_N3: IntArray, part_tokens: Sequence[int], num_tokens: int, path: Path
    ) -> None:
        self._row_N3 = row_N3
        self._offset_N = row_N3[:, 0]
        self._part_tokens = np.array(part_tokens, dtype=np.int64)
        self._part_sizes: list[int] = self._part_tokens.tolist()
        self._num_tokens = num_tokens
        self._path = path
        if not len(row_N3) or row_N3[0, 0] != 0:
            raise self._damaged_error(0)
        self.select(np.linspace(0, len(row_N3) - 1, _NUM_SPOTS).astype(np.int64))

    @classmethod
    def of_whole_parts(cls, part_tokens: Sequence[int], path: Path) -> Extents:
        """Makes the extents of whole parts, one after the other.

        Args:
            part_tokens: The tokens of each part, each at least 1.
            path: The stream's file, for messages.

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
            num_tokens: The tokens of the stream.

        Returns:
            The extents.

        Raises:
            DataError: The file is missing, of another form, or contradicts the parts.
        """
        remedy = "make the subset again with mdm subset --overwrite."
        if not path.is_file():
            raise DataError(f"{path} does not exist: copy it to its view, or {remedy}")
        try:
            # Unlike np.load this opens no archives.
            rows = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:
            # A damaged header goes through Python's own parser, which raises many things.
            raise DataError(
                f"{path} is not an array of extents ({first_line(error)}): {remedy}"
            ) from error
        if rows.shape != (num_rows, 3) or rows.dtype != np.dtype("<i8"):
            raise DataError(
                f"{path} is an array of {rows.dtype} {list(rows.shape)} and the view needs int64 "
                f"[{num_rows}, 3]: {remedy}"
            )
        return cls(rows.view(np.ndarray), part_tokens, num_tokens, path)

    def __len__(self) -> int:
        """The number of extents."""
        return len(self._row_N3)

    def locate(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Finds what covers a part of the stream.

        Args:
            start: Its first token, inside the stream.
            stop: The token after its last one, inside the stream or its end; after `start`.

        Returns:
            Part number, first token there and the token after the last one of each piece, in order.

        Raises:
            DataError: The extents there are damaged.
        """
        first = max(bisect_right(self._offset_N, start) - 1, 0)
        last = bisect_left(self._offset_N, stop, lo=first + 1)
        if last - first > stop - start:
            raise self._damaged_error(first)
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
                raise self._damaged_error(number)
            pieces.append((part, place + low - offset, place + high - offset))
        if sum(last - first for _, first, last in pieces) != stop - start:
            raise self._damaged_error(first)
        return pieces

    def place_tokens(self, token_N: IntArray) -> IntArray:
        """Finds tokens in the parts.

        Args:
            token_N: int64 [N], each in the stream.

        Returns:
            int64 [N, 2]: part number, token there.

        Raises:
            DataError: The extents there are damaged.
        """
        number_N = find_last_at_most(self._offset_N, token_N)
        part_N, first_N, length_N = self.select(number_N).T
        inside_N = token_N - self._offset_N[number_N]
        wrong_N = (inside_N < 0) | (inside_N >= length_N)
        if wrong_N.any():
            raise self._damaged_error(int(number_N[wrong_N.argmax()]))
        return np.stack([part_N, first_N + inside_N], axis=1)

    def select(self, number_N: IntArray) -> IntArray:
        """Gives whole extents by number.

        Args:
            number_N: int64 [N], each in 0..len-1.

        Returns:
            int64 [N, 3]: part number, first token there, tokens.

        Raises:
            DataError: One of them is damaged.
        """
        offset_N, part_N, start_N = self._row_N3[number_N].T
        is_last_N = number_N == len(self._row_N3) - 1
        end_N = self._offset_N[np.where(is_last_N, 0, number_N + 1)]
        end_N[is_last_N] = self._num_tokens
        # Compared with bounds first: sums and differences of damaged values could overflow.
        wrong_N = (offset_N < 0) | (end_N <= offset_N) | (end_N > self._num_tokens)
        wrong_N |= (part_N < 0) | (part_N >= len(self._part_tokens)) | (start_N < 0)
        length_N = np.where(wrong_N, 0, end_N - offset_N)
        wrong_N |= start_N > self._part_tokens[np.where(wrong_N, 0, part_N)] - length_N
        if wrong_N.any():
            raise self._damaged_error(int(number_N[wrong_N.argmax()]))
        return np.stack([part_N, start_N, length_N], axis=1)

    def verify(self, sha256: str) -> None:
        """Checks all extents, in chunks.

        Args:
            sha256: What `ExtentsWriter.sha256` gave when they were written.

        Raises:
            DataError: An extent is damaged, or they are not those that were written.
        """
        digest = hashlib.sha256()
        for start, stop in split_range(len(self)):
            self.select(np.arange(start, stop))
            digest.update(self._row_N3[start:stop].tobytes())
        digest.update(str(self._num_tokens).encode())
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{self._path} is damaged: its extents are not those that were written: make the "
                "view again with the tool that made it, with --overwrite."
            )

    def _damaged_error(self, number: int) -> DataError:
        return DataError(
            f"{self._path} is damaged: extent {number} does not follow from its neighbours or lies "
            "outside its part: make the view again with the tool that made it, with --overwrite."
        )
