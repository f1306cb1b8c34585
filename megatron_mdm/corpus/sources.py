"""Sources of a corpus: files, folders and hub data sets, cut in order into chunks of raw records.

Cutting is cheap on purpose: one process does it for many that parse and encode.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_mdm.corpus.streams import (
    count_lines,
    find_line_start,
    is_compressed,
    read_blocks,
    unreadable,
)
from megatron_mdm.data.manifest import SourceFile
from megatron_mdm.errors import DataError

CHUNK_BYTES = 1 << 20
EXTENSIONS = (
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet",
)  # fmt: skip


class Chunk(NamedTuple):
    """Some records in a row, as the source holds them.

    Attributes:
        kind: `lines`: whole lines of JSON. `text`: one document. `rows`: an Arrow stream with
            the column of texts alone.
        data: The records.
        first_record: The number of the first line, from 1 within what is read of the file, or
            of the first row, from 1 within the whole source.
        end_offset: Where the next chunk starts: a byte of the decompressed stream, or a row.
        end_record: The number of the next line or row.
    """

    kind: Literal["lines", "text", "rows"]
    data: bytes
    first_record: int
    end_offset: int
    end_record: int


class Span(NamedTuple):
    """The part of a source that is read, in bytes of the decompressed stream or in rows.

    Attributes:
        start: Where it starts.
        stop: Where it ends, exclusive; None for the end of the source.
    """

    start: int = 0
    stop: int | None = None


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
    def chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
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

    def span(self, low: int, high: int) -> Span | None:
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

    def records_before(self, span: Span) -> int:
        """Counts the records before a span that its record numbers do not count.

        Args:
            span: The span.

        Returns:
            What to add to a record's number.
        """
        return 0


class LinesSource(Source):
    """A `.jsonl` file: a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.label = str(path)
        self.size_bytes = path.stat().st_size
        self.text_bytes_per_byte = 4.0 if is_compressed(path) else 1.0

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        return SourceFile.of(self._path)

    def chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        waiting: list[bytes] = []
        for block in read_blocks(self._path, CHUNK_BYTES, start=offset, stop=span.stop):
            cut = block.rfind(b"\n") + 1
            if not cut:
                waiting.append(block)
                continue
            data = b"".join([*waiting, block[:cut]])
            waiting = [block[cut:]] if cut < len(block) else []
            end = Chunk("lines", data, record, offset + len(data), record + data.count(b"\n"))
            yield end
            offset, record = end.end_offset, end.end_record
        if waiting:
            data = b"".join(waiting)
            yield Chunk("lines", data, record, offset + len(data), record + 1)

    def span(self, low: int, high: int) -> Span | None:
        """See `Source.span`."""
        if is_compressed(self._path):
            return super().span(low, high)
        start = find_line_start(self._path, low)
        stop = find_line_start(self._path, min(high, self.size_bytes))
        if start >= stop:
            return None
        return Span() if (start, stop) == (0, self.size_bytes) else Span(start, stop)

    def records_before(self, span: Span) -> int:
        """See `Source.records_before`."""
        return count_lines(self._path, span.start) if span.start else 0


class TextSource(Source):
    """A `.txt` file: one document."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.label = str(path)
        self.size_bytes = path.stat().st_size
        self.text_bytes_per_byte = 4.0 if is_compressed(path) else 1.0

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        return SourceFile.of(self._path)

    def chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        if record == 1:
            data = b"".join(read_blocks(self._path, CHUNK_BYTES))
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


def open_sources(
    inputs: Sequence[Path] | HubDataset, text_key: str = "text", split: str | None = None
) -> list[Source]:
    """Checks that inputs exist and have a known format, before the work starts.

    Args:
        inputs: Files and folders, at least one, or a hub data set.
        text_key: The JSON key or column that holds the text.
        split: Which split of folders that `DatasetDict.save_to_disk` wrote.

    Returns:
        The sources, in order.

    Raises:
        DataError: An input is missing or of an unknown format, or a split is missing.
    """
    # Imported here because pyarrow and datasets are slow to import and many corpora do without.
    if isinstance(inputs, HubDataset):
        from megatron_mdm.corpus.tables import HubSource

        return [HubSource(inputs, text_key)]
    if not inputs:
        raise DataError("--input names no file: give at least one.")
    if split is not None and not any((path / "dataset_dict.json").is_file() for path in inputs):
        raise DataError(
            f"--split={split} has nothing to choose from: leave it out, or give --dataset or a "
            "folder with several splits."
        )
    return [_open_source(path, text_key, split) for path in inputs]


def share_of_task(sources: Sequence[Source], task: int, num_tasks: int) -> list[SourceShare]:
    """Cuts the sources' bytes into equal ranges and names the records that start in one of them.

    Every record belongs to exactly one task, and the tasks' records in order are all records.

    Args:
        sources: The sources.
        task: The number of the range, from 0.
        num_tasks: The number of ranges, 1 or more.

    Returns:
        What the task reads, in order; nothing if there are fewer records than tasks.

    Raises:
        DataError: A source cannot be read or cannot be split.
    """
    if num_tasks == 1:
        return [SourceShare(source, Span()) for source in sources]
    total = sum(source.size_bytes for source in sources)
    low, high = task * total // num_tasks, (task + 1) * total // num_tasks
    if task == num_tasks - 1:
        high = total + 1  # An empty file at the end has its first byte there.
    shares = []
    for source in sources:
        if source.size_bytes and high > 0 and low < source.size_bytes:
            span = source.span(low, high)
        else:
            span = Span() if not source.size_bytes and low <= 0 < high else None
        if span is not None:
            shares.append(SourceShare(source, span))
        low, high = low - source.size_bytes, high - source.size_bytes
    return shares


def _open_source(path: Path, text_key: str, split: str | None) -> Source:
    try:
        if path.is_dir():
            return _open_folder(path, text_key, split)
        if not path.is_file():
            raise DataError(f"{path} is not a file: give an existing file as input.")
        name = path.name.lower()
        plain = name.removesuffix(path.suffix.lower()) if is_compressed(path) else name
        if plain.endswith(".jsonl"):
            return LinesSource(path)
        if plain.endswith(".txt"):
            return TextSource(path)
        if name.endswith(".parquet"):
            from megatron_mdm.corpus.tables import ParquetSource

            return ParquetSource(path, text_key)
    except OSError as error:
        raise unreadable(path, error) from error
    raise DataError(f"{path} has an unknown extension: use one of {', '.join(EXTENSIONS)}.")


def _open_folder(path: Path, text_key: str, split: str | None) -> Source:
    from megatron_mdm.corpus.tables import SavedDatasetSource

    listing = path / "dataset_dict.json"
    if not listing.is_file():
        if not all((path / name).is_file() for name in ("dataset_info.json", "state.json")):
            raise DataError(
                f"{path} is a folder but not one that datasets.save_to_disk wrote: give files, or "
                "such a folder."
            )
        return SavedDatasetSource(path, text_key)
    try:
        splits = [str(name) for name in json.loads(listing.read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{listing} names no splits ({error}): copy the folder again.") from error
    if split not in splits:
        state = "holds several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"{path} {state}: choose one of {', '.join(splits)} with --split.")
    return SavedDatasetSource(path / str(split), text_key)


def hash_together(parts: Sequence[str]) -> str:
    """Hashes strings into one name for all of them.

    Args:
        parts: The strings, in order.

    Returns:
        A SHA-256 in hexadecimal.
    """
    return hashlib.sha256(json.dumps(list(parts)).encode("utf-8")).hexdigest()
