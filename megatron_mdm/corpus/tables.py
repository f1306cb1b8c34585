"""Sources that are tables: parquet files, saved `datasets` folders, hub data sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_mdm.core.errors import DataError, first_line
from megatron_mdm.corpus import sources
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.sources import (
    Chunk,
    FileSource,
    HubDataset,
    Source,
    Span,
    describe_together,
    hash_together,
)
from megatron_mdm.data.manifest import SourceFile

_MAX_CHUNK_ROWS = 4096
_HUB_CHUNK_ROWS = 256


class ParquetSource(FileSource):
    """A parquet file: one document per row. It is split between row groups."""

    def __init__(self, path: Path, key: RecordKey) -> None:
        super().__init__(path)
        self._key = key
        self.text_bytes_per_byte = 2.5

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                columns = file.schema_arrow.names
                self._key.check(self.label, columns)
                first_row = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    inside = span.stop is None or first_row < span.stop
                    if inside and first_row + rows > offset:
                        yield from self._read_group(file, group, first_row, offset)
                    first_row += rows
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged_error(error) from error

    def _read_group(self, file: Any, group: int, first_row: int, offset: int) -> Iterator[Chunk]:
        described = file.metadata.row_group(group)
        size_bytes = sum(
            described.column(index).total_uncompressed_size
            for index in range(described.num_columns)
            if described.column(index).path_in_schema.split(".")[0] == self._key.name
        )
        rows = choose_rows_per_chunk(size_bytes, described.num_rows)
        row = first_row
        columns = self._key.columns(file.schema_arrow.names)
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
            skipped = min(max(0, offset - row), batch.num_rows)
            if skipped < batch.num_rows:
                yield pack_rows(batch.slice(skipped).select(columns), row + skipped)
            row += batch.num_rows

    def find_span(self, low: int, high: int) -> Span | None:
        """See `Source.find_span`."""
        try:
            metadata = pyarrow.parquet.read_metadata(self._path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged_error(error) from error
        bounds = [0]
        for group in range(metadata.num_row_groups):
            bounds.append(bounds[-1] + metadata.row_group(group).num_rows)
        total = max(1, bounds[-1])
        inside = [
            (first, end)
            for first, end in itertools.pairwise(bounds)
            if low <= first * self.size_bytes // total < high
        ]
        if not inside:
            return None
        # A file or a group without rows belongs to a task too.
        span = Span(inside[0][0], inside[-1][1])
        return Span() if span == (0, bounds[-1]) else span

    def _damaged_error(self, error: Exception) -> DataError:
        return DataError(
            f"{self.label} is not a readable parquet file ({first_line(error)}): copy or write it "
            "again."
        )


class SavedDatasetSource(Source):
    """A folder that `datasets.save_to_disk` wrote: one document per row."""

    def __init__(self, folder: Path, key: RecordKey) -> None:
        self._folder = folder
        self._key = key
        self.label = str(folder)
        try:
            state = json.loads((folder / "state.json").read_bytes())
            self._files = [folder / str(file["filename"]) for file in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged_error(error) from error
        self.size_bytes = sum(path.stat().st_size for path in self._files if path.is_file())

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        files = [SourceFile.of(path) for path in self._files]
        return describe_together(self.label, files, self.size_bytes)

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        table = self._load()
        self._key.check(self.label, table.column_names)
        table = table.select_columns(self._key.columns(table.column_names)).with_format("arrow")
        stop = len(table) if span.stop is None else span.stop
        rows = choose_rows_per_chunk(table.data.nbytes, len(table))
        try:
            for row in range(offset, stop, rows):
                yield pack_rows(table[row : min(row + rows, stop)], row)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged_error(error) from error

    def find_span(self, low: int, high: int) -> Span | None:
        """See `Source.find_span`."""
        rows = len(self._load())
        # Rows are taken to be of equal size; the first one that starts at a bound or after it.
        bounds = [-(-max(0, bound) * rows // max(1, self.size_bytes)) for bound in (low, high)]
        start, stop = (min(bound, rows) for bound in bounds)
        return Span.of(start, stop, rows)

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_from_disk(str(self._folder))
        # The library raises errors of many classes for files that it cannot read.
        except Exception as error:
            raise self._damaged_error(error) from error

    def _damaged_error(self, error: Exception) -> DataError:
        return DataError(
            f"{self.label} cannot be loaded as a saved data set ({first_line(error)}): copy or "
            "save it again."
        )


class HubSource(Source):
    """A data set of the Hugging Face hub, read as a stream."""

    def __init__(self, dataset: HubDataset, key: RecordKey) -> None:
        import datasets

        self._dataset = dataset
        self._key = key
        self.label = "/".join(part for part in dataset if part)
        self.size_bytes = 0
        try:
            builder = datasets.load_dataset_builder(dataset.name, dataset.config)
            self._revision = str(builder.hash)
            self._stream = datasets.load_dataset(
                dataset.name, dataset.config, split=dataset.split, streaming=True
            )
        # Network, cache, repository and format errors have classes of several libraries.
        except Exception as error:
            raise self._unreachable_error(error) from error

    def describe(self) -> SourceFile:
        """See `Source.describe`."""
        revision = hash_together([*(part or "" for part in self._dataset), self._revision])
        return SourceFile(path=self.label, size_bytes=0, sha256=revision)

    def read_chunks(self, span: Span, offset: int, record: int) -> Iterator[Chunk]:
        """See `Source.read_chunks`."""
        stream = self._stream.with_format("arrow")
        row = offset
        batches = (stream.skip(offset) if offset else stream).iter(batch_size=_HUB_CHUNK_ROWS)
        while True:
            try:
                table = next(batches, None)
            except Exception as error:
                raise self._unreachable_error(error) from error
            if table is None:
                return
            self._key.check(self.label, table.column_names)
            yield pack_rows(table.select(self._key.columns(table.column_names)), row)
            row += table.num_rows

    def _unreachable_error(self, error: Exception) -> DataError:
        return DataError(
            f"--dataset={self._dataset.name} (configuration {self._dataset.config}, split "
            f"{self._dataset.split}) cannot be read from the hub ({first_line(error)}): check the "
            "name, --dataset-config, --split and the network."
        )


def pack_rows(columns: Any, first_row: int) -> Chunk:
    """Packs columns.

    Args:
        columns: An Arrow record batch or table.
        first_row: The number of its first row in the source, from 0.

    Returns:
        The chunk.
    """
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, columns.schema) as writer:
        writer.write(columns)
    end = first_row + columns.num_rows
    return Chunk("rows", sink.getvalue().to_pybytes(), first_row + 1, end, end + 1)


def choose_rows_per_chunk(size_bytes: int, rows: int) -> int:
    """Chooses how many rows make a chunk.

    Args:
        size_bytes: The size of the column.
        rows: Its rows.

    Returns:
        About a chunk's bytes worth of rows, 1 or more.
    """
    return max(1, min(_MAX_CHUNK_ROWS, sources.CHUNK_BYTES * rows // max(1, size_bytes)))
