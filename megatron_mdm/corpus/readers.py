"""Readers of corpora: documents one by one out of the files that people keep text in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_mdm.errors import DataError

_PARQUET_BATCH_ROWS = 1024


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Reads the documents of one file, holding few of them in memory.

    `.jsonl` and `.jsonl.gz`: one JSON object a line, empty lines are skipped. `.txt`: the file is
    one document. `.parquet`: one document a row. Documents without text come as empty strings.

    Args:
        path: The file; its extension tells the format.
        text_key: The JSON key or parquet column that holds the text.

    Returns:
        The texts in the order of the file. Every one can be encoded as UTF-8.

    Raises:
        DataError: The file is missing or has an unknown extension; and while iterating: it is
            damaged, or a document has no valid text. The message names the line or row.
    """
    return _reader_of(path)(path, text_key)


def check_source(path: Path) -> None:
    """Checks that a file can be given to `read_documents`, before the work starts.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, or has an unknown extension.
    """
    _reader_of(path)


def _reader_of(path: Path) -> Callable[[Path, str], Iterator[str]]:
    if not path.is_file():
        raise DataError(f"{path} is not a file: give an existing file as input.")
    for extension, reader in _READERS.items():
        if path.name.lower().endswith(extension):
            return reader
    known = ", ".join(_READERS)
    raise DataError(f"{path} has an unknown extension: use one of {known}.")


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            yield from _parse_lines(path, lines, text_key)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_jsonl_gz(path: Path, text_key: str) -> Iterator[str]:
    try:
        with gzip.open(path, "rb") as lines:
            yield from _parse_lines(path, lines, text_key)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is truncated or not gzip ({error}): copy or compress it again."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_txt(path: Path, text_key: str) -> Iterator[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 at byte {error.start} ({error.reason}): convert the file "
            "to UTF-8."
        ) from error


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    # Imported here because it is slow and most corpora do without.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise _missing_key(str(path), text_key, "column", columns)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _check_text(f"{path}, row {row}", text_key, text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 after row {row} ({error.reason}): write the file again."
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not a readable parquet file ({reason}): copy or write it again."
        ) from error


def _parse_lines(path: Path, lines: Iterable[bytes], text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is not valid UTF-8 at byte {error.start} of the line ({error.reason}): "
                "convert the file to UTF-8."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not valid JSON ({error}): write one JSON object a line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{where} holds a JSON {type(record).__name__}: write one JSON object a line."
            )
        if text_key not in record:
            raise _missing_key(where, text_key, "key", list(record))
        yield _check_text(where, text_key, record[text_key])


def _check_text(where: str, text_key: str, text: Any) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {text_key} is {type(text).__name__} and has to be a string: repair the "
            "input or choose another --text-key."
        )
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {text_key} holds half a surrogate pair at character {error.start}, "
                "which is not valid Unicode: repair the input."
            ) from error
    return text


def _missing_key(where: str, text_key: str, kind: str, present: list[str]) -> DataError:
    names = ", ".join(present) or "none"
    return DataError(
        f"{where} has no {kind} {text_key!r}, only {names}: choose one with --text-key."
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read ({error.strerror or error}): check the file and its permissions."
    )


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
