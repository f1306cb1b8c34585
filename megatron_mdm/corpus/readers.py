"""Readers of corpora: documents one by one out of the files that people keep text in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.inputs import open_sources
from megatron_mdm.corpus.records import (
    BadRecord,
    RecordKey,
    describe_record,
    parse_objects,
    parse_texts,
)
from megatron_mdm.corpus.sources import LinesSource, Source, Span

_Parsed = TypeVar("_Parsed")


def read_documents(path: Path, text_key: str = "text", split: str | None = None) -> Iterator[str]:
    """Reads the documents of one input, holding few of them in memory.

    `.jsonl`: one JSON object per line, empty lines are skipped. `.txt`: the file is one document.
    Both may be compressed, `.gz` or `.zst`. `.parquet`, and a folder that `datasets.save_to_disk`
    wrote: one document per row. Documents without text come as empty strings.

    Args:
        path: The file or folder; its extension tells the format.
        text_key: The JSON key or column that holds the text.
        split: Which split of a folder with several.

    Returns:
        The texts in the order of the input. Every one can be encoded as UTF-8.

    Raises:
        DataError: The input is missing or of an unknown format; and while iterating: it is
            damaged, or a document has no valid text. The message names the line or row.
    """
    (source,) = open_sources([path], RecordKey(text_key), split)
    return _read(source, text_key)


def sample_documents(
    documents: Iterable[str], max_documents: int | None = None, max_bytes: int | None = None
) -> Iterator[str]:
    """Draws an even sample: every k-th document, with k the least power of two that fits.

    Args:
        documents: All documents. The sample is held in memory while they are read.
        max_documents: The most documents to keep, None for no limit.
        max_bytes: The most bytes of UTF-8 text to keep, None for no limit.

    Yields:
        The documents kept, in order, at least the first. Without a limit, all as they come.

    Raises:
        DataError: A limit is less than 1.
    """
    for name, limit in (("--max-documents", max_documents), ("--max-bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise DataError(f"{name}={limit} has to be at least 1: use more or leave it out.")
    if max_documents is None and max_bytes is None:
        yield from documents
        return
    kept: list[str] = []
    kept_bytes = 0
    stride = 1
    for number, text in enumerate(documents):
        if number % stride:
            continue
        kept.append(text)
        kept_bytes += len(text.encode("utf-8"))
        while len(kept) > 1 and (
            (max_documents is not None and len(kept) > max_documents)
            or (max_bytes is not None and kept_bytes > max_bytes)
        ):
            kept = kept[::2]
            kept_bytes = sum(len(text.encode("utf-8")) for text in kept)
            stride *= 2
    yield from kept


def open_lines(inputs: Sequence[Path], remedy: str) -> list[Source]:
    """Opens files of JSON lines.

    Args:
        inputs: `.jsonl` files, perhaps compressed.
        remedy: What to do about another file, for the message.

    Returns:
        The sources.

    Raises:
        DataError: One is missing, or of another format.
    """
    sources = open_sources(inputs)
    for source in sources:
        if not isinstance(source, LinesSource):
            raise DataError(f"{source.label} is no .jsonl file: {remedy}")
    return sources


def read_objects(
    sources: Iterable[Source], parse: Callable[[dict[str, Any]], _Parsed]
) -> Iterator[tuple[str, _Parsed | BadRecord]]:
    """Reads the lines of files of JSON.

    Args:
        sources: The files.
        parse: Makes something of a line's object, or raises BadRecordError.

    Yields:
        What messages call a line, and what was made of it or what is wrong with it.
    """
    for source in sources:
        for chunk in source.read_chunks(Span(), 0, 1):
            for record, parsed in parse_objects(chunk, parse):
                yield describe_record(chunk, source.label, record), parsed


def _read(source: Source, text_key: str) -> Iterator[str]:
    for chunk in source.read_chunks(Span(), 0, 1):
        for record, text in parse_texts(chunk, text_key):
            if isinstance(text, BadRecord):
                where = describe_record(chunk, source.label, record)
                raise DataError(where + text.complaint)
            yield text
