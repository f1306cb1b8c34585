"""A stream whose documents stand in a new order in each pass, found without an index of them.

The order is a keyed bijection, so nothing of it is saved. Where a token lies follows from the
lengths of the documents before it: of a pass in use, their sums are kept for every so many
documents, and what lies between is computed again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.order import DocumentKey, Permutation
from megatron_mdm.data.source import IntArray, TokenSource, spread_blocks

# Sums of a pass: 8 bytes each, and as much again where each document has its own.
_MOST_SUMS = 1 << 20
# At the end of a pass some threads still read it while others begin the next one.
_MOST_PASSES = 2
_CHUNK_DOCUMENTS = 1 << 17
_NUM_TOLD_DOCUMENTS = 1024


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        part: Number in `parts` of the source.
        start: The first token there.
        stop: The token after the last one.
    """

    part: int
    start: int
    stop: int


class DocumentOrder:
    """The documents of a source, one after the other in the order that a key names.

    Threads may ask at once. The first one that asks for a new key looks at the length of every
    document; others that need it wait.

    Args:
        source: An open source.
        num_tokens: Its first so many tokens take part; the document that they end in is cut.

    Raises:
        DataError: The source does not say where its documents lie.
    """

    def __init__(self, source: TokenSource, num_tokens: int) -> None:
        self._source = source
        self._num_tokens = num_tokens
        self._lock = threading.Lock()
        self._passes: OrderedDict[DocumentKey, Future[_Pass]] = OrderedDict()
        known = source.locate_documents(np.zeros(0, dtype=np.int64))
        if known is None or not source.num_documents:
            raise DataError(
                f"data.order=documents needs to know where the documents of {source.prefix} lie, "
                f"and {type(source).__name__} does not say so: give it locate_documents, or use "
                "data.order=shuffle."
            )

    def locate(self, key: DocumentKey, start: int, stop: int) -> list[Piece]:
        """Finds what covers a part of the stream.

        Args:
            key: Names the order.
            start: Its first token, 0 or more.
            stop: The token after its last one, after `start` and at most `num_tokens`.

        Returns:
            The pieces in order; each but the first begins a document.

        Raises:
            DataError: What says where documents lie is damaged.
        """
        begin, document_N = self._find_pass(key).find_documents(start, stop)
        part_N, place_N, length_N = self._locate(document_N).T
        end_N = begin + np.cumsum(length_N)
        begin_N = end_N - length_N
        shown_N = (length_N > 0) & (end_N > start) & (begin_N < stop)
        low_N = np.maximum(start - begin_N, 0)
        high_N = np.minimum(stop - begin_N, length_N)
        rows_N3 = np.stack([part_N, place_N + low_N, place_N + high_N], axis=1)[shown_N]
        return [Piece(*row) for row in rows_N3.tolist()]

    def describe(self) -> str:
        """Tells where up to 1,024 documents lie, spread over all, as what identifies the order."""
        count = self._source.num_documents
        spread_N = np.array(spread_blocks(count, 1, _NUM_TOLD_DOCUMENTS), dtype=np.int64)
        return f"documents {count} {self._locate_whole(spread_N)[:, 2].tolist()}"

    def _find_pass(self, key: DocumentKey) -> _Pass:
        with self._lock:
            found = self._passes.get(key)
            is_new = found is None
            if found is None:
                found = self._passes[key] = Future()
            self._passes.move_to_end(key)
            if len(self._passes) > _MOST_PASSES:
                self._passes.popitem(last=False)
        if is_new:
            try:
                found.set_result(self._begin_pass(key))
            except BaseException as error:
                found.set_exception(error)
        return found.result()

    def _begin_pass(self, key: DocumentKey) -> _Pass:
        count, _ = self._cut
        begun = _Pass(count, key)
        # In the order in which they are stored, which storage reads fast.
        for first in range(0, count, _CHUNK_DOCUMENTS):
            document_N = np.arange(first, min(first + _CHUNK_DOCUMENTS, count))
            begun.add(document_N, self._locate(document_N)[:, 2])
        num_tokens = begun.finish()
        if num_tokens != self._num_tokens:
            raise DataError(
                f"the documents of {self._source.prefix} hold {num_tokens} tokens together, and "
                f"the stream has {self._num_tokens}: check it with mdm inspect, or use "
                "data.order=shuffle."
            )
        return begun

    @cached_property
    def _cut(self) -> tuple[int, int | None]:
        """Documents that take part, and the tokens of the last one if it is cut."""
        count = self._source.num_documents
        if self._num_tokens == self._source.num_tokens:
            return count, None
        num_left = self._num_tokens
        for first in range(0, count, _CHUNK_DOCUMENTS):
            document_N = np.arange(first, min(first + _CHUNK_DOCUMENTS, count))
            ends_N = np.cumsum(self._locate_whole(document_N)[:, 2])
            last = int(np.searchsorted(ends_N, num_left))
            if last < len(ends_N):
                before = int(ends_N[last - 1]) if last else 0
                return first + last + 1, num_left - before
            num_left -= int(ends_N[-1])
        return count, None

    def _locate(self, document_N: IntArray) -> IntArray:
        """Places of documents as they take part, int64 [N, 3]."""
        located_N3 = self._locate_whole(document_N)
        count, last_tokens = self._cut
        if last_tokens is not None:
            located_N3[document_N == count - 1, 2] = last_tokens
        return located_N3

    def _locate_whole(self, document_N: IntArray) -> IntArray:
        located_N3 = self._source.locate_documents(document_N)
        assert located_N3 is not None
        return located_N3


class _Pass:
    """An order of documents: sums of their lengths, at the end of every block of documents."""

    def __init__(self, num_documents: int, key: DocumentKey) -> None:
        self._permutation = Permutation(num_documents, key)
        self._num_documents = num_documents
        self._block = -(-num_documents // _MOST_SUMS)
        self._sums_B = np.zeros(-(-num_documents // self._block), dtype=np.int64)
        # Of few documents the order itself is kept, which is faster to look up than to compute.
        is_small = self._block == 1
        self._order_N = np.empty(num_documents, dtype=np.int64) if is_small else None

    def add(self, document_N: IntArray, length_N: IntArray) -> None:
        """Adds the lengths of documents, each of which is added once."""
        place_N = self._permutation.invert(document_N)
        np.add.at(self._sums_B, place_N // self._block, length_N)
        if self._order_N is not None:
            self._order_N[place_N] = document_N

    def finish(self) -> int:
        """Adds the blocks up; returns the tokens of all documents."""
        np.cumsum(self._sums_B, out=self._sums_B)
        return int(self._sums_B[-1])

    def find_documents(self, start: int, stop: int) -> tuple[int, IntArray]:
        """Finds documents that cover a part of the stream, and some around it.

        Returns:
            Where the first one begins, and their numbers in order.
        """
        first = int(np.searchsorted(self._sums_B, start, side="right"))
        last = int(np.searchsorted(self._sums_B, stop, side="left"))
        begin = int(self._sums_B[first - 1]) if first else 0
        places = slice(first * self._block, min((last + 1) * self._block, self._num_documents))
        if self._order_N is not None:
            return begin, self._order_N[places]
        return begin, self._permutation(np.arange(places.start, places.stop))
