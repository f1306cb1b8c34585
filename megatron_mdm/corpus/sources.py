"""Sources of a corpus: files, folders and hub data sets, cut in order into chunks of raw records.

Cutting is cheap on purpose: one process does it for many that parse and encode.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.streams import count_lines, find_line_start, is_compressed, read_blocks
from megatron_mdm.data.manifest import SourceFile

CHUNK_BYTES = 1 << 20
# Parsing a record takes several times its size of memory.
MAX_RECORD_BYTES = 1 << 30


class Chunk(NamedTuple):
    """Some records in a row, as the source holds them.

    Attributes:
        kind: `lines`: whole lines of JSON. `text`: one document. `rows`: an Arrow stream with
            the column of texts or ids alone, perhaps with that of a mask. `tokens`: the ids of
            whole documents.
        data: The records; empty of `tokens`.
        first_record: The number of the first line, from 1 within what is read of the file, or
            of the first row or token, from 1 within the whole source.
        end_offset: Where the next chunk starts: a byte of the decompressed stream, a row or a
            token.
        end_record: The number of the next line, row or token.
        tokens: Of `tokens`, the ids of all documents in a row, of any integer type.
        lengths: Of `tokens`, the number in each document, int64 [documents].
    """

    kind: Literal["lines", "text", "rows", "tokens"]
    data: bytes
    first_record: int
    end_offset: int
    end_record: int
    tokens: npt.NDArray[Any] | None = None
    lengths: npt.NDArray[np.int64] | None = None

    @property
    def num_bytes(self) -> int:
        """The bytes of the records."""
        return len(self.data) if self.tokens is None else self.tokens.nbytes

    def without_content(self) -> Chunk:
        """The same chunk, so small that it can wait for its records to be encoded."""
        return self._replace(data=b"", tokens=None, lengths=None)


class Span(NamedTuple):
    """The part of a source that is read, in bytes of the decompressed stream, rows or tokens.

    Attributes:
        start: Where it starts.
        stop: Where it ends, exclusive; None for the end of the source.
    """

    start: int = 0
    stop: int | None = None

    @classmethod
    def of(cls, start: int, stop: int, size: int) -> Span | None:
        """Names a part of a source.

        Args:
            start: Where it starts.
            stop: Where it ends, exclusive.
            size: The size of the source.

        Returns:
            The span, without bounds for the whole source; None for nothing.
        """
        if start >= stop:
            return None
        return cls() if (start, stop) == (0, size) else cls(start, stop)


class Source(ABC):
    """One input.

    Attributes:
        label: What messages and the manifest call it.
        size_bytes: Its size on disk, 0 where nobody knows.
        text_bytes_per_byte: About how much text a byte on disk holds.
    """

    label: str
    size_bytes: int
    text_bytes_per_byte = 1.0

    @abstractmethod
    def describe(self) -> SourceFile:
        """Describes the whole source for the manifest.

        Raises:
            DataError: It cannot be read.
        """

    @abstractmethod
    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """Cuts the source into chunks.

        Args:
            span: The part to read.
            offset: Where to start in it, the `end_offset` of a chunk or the span's start.
            record: The number of the record there.

        Yields:
            Chunks in order.

        Raises:
            DataError: The source cannot be read or is damaged.
        """

    def find_span(self, low: int, high: int) -> Span | None:
        """Names the records that start in a range of the source's bytes.

        Ranges that follow each other give spans that follow each other.

        Args:
            low: The first byte.
            high: The byte after the last one.

        Returns:
            The span, or None for no record. A source that cannot be split belongs to its first
            byte.

        Raises:
            DataError: The source cannot be read.
        """
        return Span() if low <= 0 < high else None

    def count_records_before(self, span: Span) -> int:
        """Counts the records before a span that its record numbers do not count.

        Args:
            span: The span.

        Returns:
            What to add to a record's number.
        """
        return 0

    def estimate_tokens(self, span: Span, bytes_per_token: float) -> float:
        """Guesses how many tokens a span gives.

        Args:
            span: The span.
            bytes_per_token: How many bytes of a record make a token, on average.

        Returns:
            A number on the small side.
        """
        start, stop = span
        size_bytes = self.size_bytes if stop is None else stop - start
        return size_bytes * self.text_bytes_per_byte / bytes_per_token


class FileSource(Source):
    """A file that is read by itself, perhaps compressed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.label = str(path)
        self.size_bytes = path.stat().st_size
        self.text_bytes_per_byte = 4.0 if is_compressed(path) else 1.0

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        return SourceFile.of(self._path)

    def too_long_error(self, place: str) -> DataError:
        """Says that a record, at a place in the file, does not fit the memory."""
        return DataError(
            f"{self.label}{place} has more than {MAX_RECORD_BYTES} bytes and a document has to fit "
            "the memory: divide it, or check that the file is what it should be."
        )


class LinesSource(FileSource):
    """A file of JSON lines: an object each."""

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        waiting: list[bytes] = []
        num_waiting = 0
        for block in read_blocks(self._path, CHUNK_BYTES, start=offset, stop=span.stop):
            cut = block.rfind(b"\n") + 1
            if not cut:
                waiting.append(block)
                num_waiting += len(block)
                if num_waiting > MAX_RECORD_BYTES:
                    raise self.too_long_error(f", line {record + self.count_records_before(span)}")
                continue
            num_waiting = len(block) - cut
            data = b"".join([*waiting, block[:cut]])
            waiting = [block[cut:]] if cut < len(block) else []
            end = Chunk("lines", data, record, offset + len(data), record + data.count(b"\n"))
            yield end
            offset, record = end.end_offset, end.end_record
        if waiting:
            data = b"".join(waiting)
            yield Chunk("lines", data, record, offset + len(data), record + 1)

    def find_span(self, low: int, high: int) -> Span | None:
        """See `Source.find_span`."""
        if is_compressed(self._path):
            return super().find_span(low, high)
        start = find_line_start(self._path, low)
        stop = find_line_start(self._path, min(high, self.size_bytes))
        return Span.of(start, stop, self.size_bytes)

    def count_records_before(self, span: Span) -> int:
        """See `Source.count_records_before`."""
        return count_lines(self._path, span.start) if span.start else 0


class TextSource(FileSource):
    """A `.txt` file: one document."""

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        if record == 1:
            blocks: list[bytes] = []
            num_bytes = 0
            for block in read_blocks(self._path, CHUNK_BYTES):
                blocks.append(block)
                num_bytes += len(block)
                if num_bytes > MAX_RECORD_BYTES:
                    raise self.too_long_error("")
            data = b"".join(blocks)
            yield Chunk("text", data, 1, len(data), 2)


class SourceShare(NamedTuple):
    """A source and what of it is read.

    Attributes:
        source: The source.
        span: The part.
    """

    source: Source
    span: Span

    def describe(self) -> SourceFile:
        """Describes it for the manifest.

        Returns:
            The source with the slice, which is left out for a whole source.

        Raises:
            DataError: It cannot be read.
        """
        whole = self.source.describe()
        if self.span == Span():
            return whole
        return whole.model_copy(update={"start": self.span.start, "stop": self.span.stop})


class HubDataset(NamedTuple):
    """A data set of the Hugging Face hub.

    Attributes:
        name: Its name, or a local folder that `datasets.load_dataset` can load.
        config: Its configuration, or None for the only one.
        split: The split to read.
    """

    name: str
    config: str | None = None
    split: str = "train"


def hash_together(parts: Sequence[str]) -> str:
    """Hashes strings into one name for all of them.

    Args:
        parts: The strings, in order.

    Returns:
        A SHA-256 in hexadecimal.
    """
    return hashlib.sha256(json.dumps(list(parts)).encode("utf-8")).hexdigest()


def describe_together(
    label: str, files: Sequence[SourceFile], size_bytes: int | None = None
) -> SourceFile:
    """Describes files that are read as one.

    Args:
        label: What they are called.
        files: Their descriptions, in order, at least one.
        size_bytes: What they hold in all; None for the sum of their sizes, and then a single file
            is described as it is.

    Returns:
        One description, with a hash over theirs.
    """
    if size_bytes is None and len(files) == 1:
        return files[0]
    size_bytes = sum(file.size_bytes for file in files) if size_bytes is None else size_bytes
    digest = hash_together([str(file.sha256) for file in files])
    return SourceFile(path=label, size_bytes=size_bytes, sha256=digest)
