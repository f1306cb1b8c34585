"""Sources that are token ids already: files of tokens, and rows that are windows of a stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources
from megatron_mdm.corpus.ids import read_rows
from megatron_mdm.corpus.records import describe_record
from megatron_mdm.corpus.sources import Chunk, Source, SourceShare, Span, describe_together
from megatron_mdm.corpus.token_files import TokenFile, ends_path
from megatron_mdm.corpus.tokenizer import TokenizerHandle
from megatron_mdm.data.manifest import SourceFile
from megatron_mdm.data.positional_file import PositionalFile

# A document has to fit the memory; one this long is a corpus whose ends were not recognised.
MAX_TOKENS_WITHOUT_END = 1 << 28


class _TokenFiles(Source):
    """Files of tokens of one type; positions are tokens."""

    def __init__(self, label: str, files: Sequence[TokenFile]) -> None:
        self.label = label
        self._files = list(files)
        self._dtype = files[0].dtype
        self._num_tokens = sum(file.num_tokens for file in files)
        self.size_bytes = self._num_tokens * self._dtype.itemsize

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        return describe_together(self.label, [SourceFile.of(file.path) for file in self._files])

    def find_span(self, low: int, high: int) -> Span | None:
        """See `Source.find_span`. A document belongs to the task in whose range it starts."""
        tokens = [-(-max(0, bound) // self._dtype.itemsize) for bound in (low, high)]
        start, stop = (self._find_document_start(min(token, self._num_tokens)) for token in tokens)
        return Span.of(start, stop, self._num_tokens)

    def estimate_tokens(self, span: Span, bytes_per_token: float) -> float:
        """See `Source.estimate_tokens`; here the number is known."""
        return float(self._find_stop(span) - span.start)

    def _find_stop(self, span: Span) -> int:
        return self._num_tokens if span.stop is None else span.stop

    @abstractmethod
    def _find_document_start(self, token: int) -> int:
        """Finds where the first document starts at a token, in 0..num_tokens, or after it."""


class StreamSource(_TokenFiles):
    """Files of tokens, one after the other: one stream, cut after each end-of-document id.

    A document may begin in one file and end in the next.

    Args:
        files: The files, all of one type, at least one.
        tokenizer: What made the tokens.
        is_copied: Whether the tokens are written anew, so that a last document without an end gets
            one.
    """

    def __init__(
        self, files: Sequence[TokenFile], tokenizer: TokenizerHandle, *, is_copied: bool
    ) -> None:
        more = f" to {files[-1].path}" if len(files) > 1 else ""
        super().__init__(f"{files[0].path}{more}", files)
        self._tokenizer = tokenizer
        self._is_copied = is_copied

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        stop = self._find_stop(span)
        cutter = _Cutter(self._tokenizer, self.label, offset, has_end=record > 1)
        yield from cutter.cut(self._read_blocks(offset, stop))
        rest = cutter.take_rest()
        if not len(rest):
            return
        if not cutter.has_end:
            raise _no_end_error(self.label, self._num_tokens, self._tokenizer)
        if self._is_copied:
            rest = np.append(rest, self._dtype.type(self._tokenizer.eod_token_id))
        chunk = _pack_tokens(rest, np.array([len(rest)]), cutter.offset)
        yield chunk._replace(end_offset=stop, end_record=stop + 1)

    def _find_document_start(self, token: int) -> int:
        if token in (0, self._num_tokens):
            return token
        position = token - 1
        for block in self._read_blocks(position, self._num_tokens):
            found = np.flatnonzero(block == self._tokenizer.eod_token_id)
            if len(found):
                return position + int(found[0]) + 1
            position += len(block)
        return self._num_tokens

    def _read_blocks(self, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        first = 0
        for file in self._files:
            low, high = max(start - first, 0), min(stop - first, file.num_tokens)
            count = max(1, sources.CHUNK_BYTES // self._dtype.itemsize)
            for place in range(low, high, count):
                yield file.read(place, min(count, high - place))
            first += file.num_tokens


class KnownDocuments(_TokenFiles):
    """A file of tokens whose documents have known lengths.

    Args:
        file: The file. Of datatrove's, the index says where documents end; of another, each row of
            a two-dimensional array is a document, or all of the file.
    """

    def __init__(self, file: TokenFile) -> None:
        super().__init__(str(file.path), [file])
        if file.format == "datatrove":
            index = PositionalFile(ends_path(file.path))
            self._ends = index.map("<u8", 0, index.size_bytes // 8)
        else:
            length = file.row_tokens or file.num_tokens
            self._ends = np.arange(1, file.num_tokens // length + 1, dtype=np.uint64) * length

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        (file,), stop = self._files, self._find_stop(span)
        per_chunk = max(1, sources.CHUNK_BYTES // self._dtype.itemsize)
        while offset < stop:
            first = int(np.searchsorted(self._ends, offset, side="right"))
            last = int(np.searchsorted(self._ends, min(offset + per_chunk, stop), side="right"))
            ends = self._ends[first : max(last, first + 1)].astype(np.int64)
            lengths = np.diff(ends, prepend=offset)
            if len(ends) == 0 or lengths.min() < 0 or ends[-1] > stop:
                raise DataError(
                    f"{ends_path(file.path)} is damaged: the ends of documents near "
                    f"{offset} do not rise up to {self._num_tokens}: copy it again."
                )
            tokens = file.read(offset, int(ends[-1]) - offset)
            yield _pack_tokens(tokens, lengths, offset)
            offset = int(ends[-1])

    def _find_document_start(self, token: int) -> int:
        starts = np.concatenate([[0], self._ends.astype(np.int64)])
        return int(starts[min(int(np.searchsorted(starts, token)), len(starts) - 1)])


class JoinedRows(Source):
    """Rows of ids that are windows of one stream, cut after each end-of-document id.

    What comes after the last end stays as it is: a window has cut it off.

    Args:
        shares: Sources of rows and what of them is read, in order.
        ids_key: The key or column of the ids.
        tokenizer: What made them.
        is_whole: Whether this is all of the stream. A task's share of it may have no end.
    """

    def __init__(
        self,
        shares: Sequence[SourceShare],
        ids_key: str,
        tokenizer: TokenizerHandle,
        *,
        is_whole: bool,
    ) -> None:
        self._shares = list(shares)
        self._ids_key = ids_key
        self._tokenizer = tokenizer
        self._is_whole = is_whole
        self.label = shares[0].source.label
        self.size_bytes = sum(share.source.size_bytes for share in shares)

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        described = [share.describe() for share in self._shares]
        return describe_together(self.label, described, self.size_bytes)

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`. All rows are read up to a place: none is entered within."""
        offset = offset if record > 1 else 0
        cutter = _Cutter(self._tokenizer, self.label, offset, has_end=record > 1)
        yield from cutter.cut(_skip_tokens(self._read_rows(), offset))
        rest = cutter.take_rest()
        if len(rest):
            if self._is_whole and not cutter.has_end:
                raise _no_end_error(self.label, len(rest), self._tokenizer)
            yield _pack_tokens(rest, np.array([len(rest)]), cutter.offset)

    def estimate_tokens(self, span: Span, bytes_per_token: float) -> float:
        """See `Source.estimate_tokens`."""
        return sum(
            share.source.estimate_tokens(share.span, bytes_per_token) for share in self._shares
        )

    def _read_rows(self) -> Iterator[npt.NDArray[Any]]:
        for source, span in self._shares:
            for chunk in source.read_chunks(span, span.start, 1):
                rows = read_rows(chunk, self._ids_key)
                if rows.bad_records:
                    bad = rows.bad_records[0]
                    record = bad.record + source.count_records_before(span)
                    raise DataError(describe_record(chunk, source.label, record) + bad.complaint)
                yield rows.tokens


class _Cutter:
    """Cuts blocks of a stream after each end-of-document id, keeping what has none yet.

    Attributes:
        offset: The token of the stream after the last document that was cut off.
        has_end: Whether one was, or had been before.
    """

    def __init__(
        self, tokenizer: TokenizerHandle, label: str, offset: int, *, has_end: bool
    ) -> None:
        self.offset = offset
        self.has_end = has_end
        self._tokenizer = tokenizer
        self._label = label
        self._waiting: list[npt.NDArray[Any]] = []
        self._num_waiting = 0

    def cut(self, blocks: Iterable[npt.NDArray[Any]]) -> Iterator[Chunk]:
        """Takes all blocks; yields the documents that have ended."""
        for block in blocks:
            ends = np.flatnonzero(block == self._tokenizer.eod_token_id) + 1
            if not len(ends):
                self._waiting.append(block)
                self._num_waiting += len(block)
                if self._num_waiting > MAX_TOKENS_WITHOUT_END:
                    raise _no_end_error(self._label, self._num_waiting, self._tokenizer)
                continue
            cut = int(ends[-1])
            tokens = np.concatenate([*self._waiting, block[:cut]]) if self._waiting else block[:cut]
            lengths = np.diff(ends, prepend=-self._num_waiting)
            self._waiting = [block[cut:]] if cut < len(block) else []
            self._num_waiting = len(block) - cut
            self.has_end = True
            yield _pack_tokens(tokens, lengths, self.offset)
            self.offset += len(tokens)

    def take_rest(self) -> npt.NDArray[Any]:
        """What has no end."""
        return np.concatenate(self._waiting) if self._waiting else np.empty(0, np.int64)


def _skip_tokens(blocks: Iterable[npt.NDArray[Any]], num_tokens: int) -> Iterator[npt.NDArray[Any]]:
    """Leaves out the first tokens of a stream."""
    for block in blocks:
        if num_tokens < len(block):
            yield block[num_tokens:]
        num_tokens = max(0, num_tokens - len(block))


def _pack_tokens(
    tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], first_token: int
) -> Chunk:
    end = first_token + len(tokens)
    return Chunk("tokens", b"", first_token + 1, end, end + 1, tokens, lengths.astype(np.int64))


def _no_end_error(label: str, num_tokens: int, tokenizer: TokenizerHandle) -> DataError:
    return DataError(
        f"{label} holds no end-of-document id {tokenizer.eod_token_id} ({tokenizer.eod_token!r}) "
        f"within {num_tokens} tokens: check --tokenizer and --dtype, name the token that ends "
        "documents with --eod-token, or take each file or row for a document with "
        "--no-split-at-eod."
    )
