"""Texts out of chunks of raw records, with the records that hold none named one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.data.index import MAX_DOCUMENT_TOKENS

# A token takes a byte of text or more, and the end of the document takes one more token.
MAX_TEXT_BYTES = MAX_DOCUMENT_TOKENS - 1
_MAX_NAMES = 10
_BYTE_ORDER_MARK = "\ufeff"
_JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_ID_COLUMN_HINT = ", or a column of token ids with --ids-key"
_WHITESPACE = " \t\r\n\v\f"


_Item = TypeVar("_Item")
_Parsed = TypeVar("_Parsed")


class RecordKey(NamedTuple):
    """The key or column that holds the documents.

    Attributes:
        name: Its name.
        option: The option that names it.
        mask: A key or column beside it that says which ids are padding, if it is there.
    """

    name: str = "text"
    option: str = "--text-key"
    mask: str | None = None

    @property
    def holds_ids(self) -> bool:
        """Whether the documents are token ids."""
        return self.option == "--ids-key"

    def columns(self, names: Sequence[str]) -> list[str]:
        """Chooses what to read of a table.

        Args:
            names: Its columns.

        Returns:
            The one of the documents first.
        """
        return [name for name in (self.name, self.mask) if name is not None and name in names]

    def check(self, label: str, names: Sequence[str]) -> None:
        """Checks that a table has the column.

        Args:
            label: What messages call the table.
            names: Its columns.

        Raises:
            DataError: It has not.
        """
        if self.name not in names:
            raise DataError(
                f"{label} has no column {self.name!r}, only {name_some(names)}: choose one with "
                f"{self.option}{'' if self.holds_ids else _ID_COLUMN_HINT}."
            )


class BadRecordError(Exception):
    """A record cannot be used; says what is wrong and what to do, and follows the record's name."""


class BadRecord(NamedTuple):
    """A record that cannot be used.

    Attributes:
        record: Its number, counted as the chunk counts.
        complaint: What is wrong and what to do; follows the name of the record in a message.
    """

    record: int
    complaint: str


class ParsedChunk(NamedTuple):
    """The texts of a chunk.

    Attributes:
        texts: The texts, in order. Every one can be encoded as UTF-8; some may be empty.
        bad_records: The other records, in order; empty lines are none.
    """

    texts: list[str]
    bad_records: list[BadRecord]


def parse_chunk(chunk: Chunk, text_key: str) -> ParsedChunk:
    """Reads the texts of a chunk.

    Args:
        chunk: The chunk.
        text_key: The JSON key that holds the text, or what messages call the column.

    Returns:
        Texts and bad records.
    """
    parsed = ParsedChunk([], [])
    for _, text in parse_texts(chunk, text_key):
        if isinstance(text, BadRecord):
            parsed.bad_records.append(text)
        else:
            parsed.texts.append(text)
    return parsed


def parse_texts(chunk: Chunk, text_key: str) -> Iterator[tuple[int, str | BadRecord]]:
    """Reads the texts of a chunk one by one.

    Args:
        chunk: The chunk.
        text_key: As for `parse_chunk`.

    Returns:
        As `parse_each`.
    """
    if chunk.kind == "lines":
        return parse_objects(
            chunk, lambda fields: check_text(pick_value(fields, text_key, "--text-key"), text_key)
        )
    if chunk.kind == "rows":
        return parse_each(_read_rows(chunk), lambda value: _check_row(value, text_key))
    return parse_each([(1, chunk.data)], _decode_document)


def describe_record(chunk: Chunk, label: str, record: int) -> str:
    """Names a record in a message.

    Args:
        chunk: Its chunk.
        label: Its source.
        record: Its number in the source.

    Returns:
        Such as `a.jsonl, line 7`.
    """
    unit = {"lines": ", line ", "rows": ", row ", "tokens": ", token "}.get(chunk.kind)
    return f"{label}{unit}{record}" if unit else label


def parse_each(
    items: Iterable[tuple[int, _Item]], parse: Callable[[_Item], _Parsed]
) -> Iterator[tuple[int, _Parsed | BadRecord]]:
    """Parses records one by one, and goes on after one that cannot be used.

    Args:
        items: The number of each record, and the record.
        parse: Makes something of a record, or raises BadRecordError.

    Yields:
        The number of each, and what was made of it or what is wrong with it.
    """
    for record, item in items:
        try:
            yield record, parse(item)
        except BadRecordError as error:
            yield record, BadRecord(record, str(error))


def parse_objects(
    chunk: Chunk, parse: Callable[[dict[str, Any]], _Parsed]
) -> Iterator[tuple[int, _Parsed | BadRecord]]:
    """Parses the lines of a chunk of JSON.

    Args:
        chunk: A chunk of lines.
        parse: Makes something of a line's object, or raises BadRecordError.

    Yields:
        As `parse_each`, for each line that is not empty.
    """
    return parse_each(_split_lines(chunk), lambda line: parse(_parse_object(line)))


def pick_value(fields: dict[str, Any], key: str, option: str) -> Any:
    """Picks a value of a record.

    Args:
        fields: The record.
        key: The key.
        option: The option that names the key.

    Returns:
        The value.

    Raises:
        BadRecordError: The record lacks the key.
    """
    if key in fields:
        return fields[key]
    remedy = f"choose one with {option}"
    lists = [name for name, value in fields.items() if is_list_of_ids(value)]
    if option == "--text-key" and lists:
        remedy += f"; if {lists[0]} holds token ids, give --ids-key {lists[0]}"
    raise BadRecordError(f" has no key {key!r}, only {name_some(fields)}: {remedy}.")


def name_some(names: Iterable[str]) -> str:
    """Names a few of many.

    Args:
        names: The names.

    Returns:
        The first ten and how many more there are, or `none`.
    """
    every = list(names)
    more = f" and {len(every) - _MAX_NAMES} more" if len(every) > _MAX_NAMES else ""
    return ", ".join(every[:_MAX_NAMES]) + more if every else "none"


def is_list_of_ids(value: Any) -> bool:
    """Tells whether a value of a JSON record may be token ids.

    Args:
        value: The value.

    Returns:
        Whether it is a list that begins with an integer.
    """
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def name_json_type(value: Any) -> str:
    """Names the type of a value as JSON does.

    Args:
        value: What a JSON reader or a table gave.

    Returns:
        Such as `null`, `array` or `number`; of what JSON lacks, Python's name.
    """
    return _JSON_TYPES.get(type(value), type(value).__name__)


def check_text(text: Any, name: str) -> str:
    """Checks that a value is text that can be encoded.

    Args:
        text: The value.
        name: What messages call it.

    Returns:
        The text.

    Raises:
        BadRecordError: It is not.
    """
    if not isinstance(text, str):
        raise BadRecordError(
            f": {name} is {name_json_type(text)} and has to be a string: repair the input or "
            "choose another key."
        )
    size_bytes = len(text)
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    if not text.isascii():
        try:
            size_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise BadRecordError(
                f": {name} holds half a surrogate pair at character {error.start}, which is "
                "not valid Unicode: repair the input."
            ) from error
    if size_bytes > MAX_TEXT_BYTES:
        raise BadRecordError(
            f": {name} has {size_bytes} bytes and a document may have {MAX_TEXT_BYTES}, "
            "since its tokens are counted with 32 bits: split the document."
        )
    return text


def _decode_document(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f" is not valid UTF-8 at byte {error.start} ({error.reason}): convert the file to "
            "UTF-8."
        ) from error


def _split_lines(chunk: Chunk) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yields the lines that are not empty and their numbers."""
    lines: Sequence[str | UnicodeDecodeError]
    try:
        # Much faster than line by line, and cut at the same bytes.
        lines = chunk.data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = [_decode(line) for line in chunk.data.split(b"\n")]
    for record, line in enumerate(lines, start=chunk.first_record):
        if isinstance(line, UnicodeDecodeError) or line.strip(_WHITESPACE):
            yield record, line


def _decode(line: bytes) -> str | UnicodeDecodeError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _parse_object(line: str | UnicodeDecodeError) -> dict[str, Any]:
    if isinstance(line, UnicodeDecodeError):
        raise BadRecordError(
            f" is not valid UTF-8 at byte {line.start} of the line ({line.reason}): convert the "
            "file to UTF-8."
        )
    try:
        # Files that were joined may hold the mark within, and no line of JSON can begin with it.
        fields = _parse_json(line.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(
            f" is not valid JSON ({error}): write one JSON object per line."
        ) from error
    if not isinstance(fields, dict):
        raise BadRecordError(
            f" holds a JSON {name_json_type(fields)}: write one JSON object per line."
        )
    return fields


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python refuses integers of thousands of digits, which stand in fields that nobody reads.
        return json.loads(line, parse_int=float)


def _read_rows(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.ipc.open_stream(chunk.data) as stream:
        column = stream.read_all().column(0)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_read_value(scalar) for scalar in column]
    return enumerate(values, start=chunk.first_record)


def _read_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _check_row(value: Any, text_key: str) -> str:
    if isinstance(value, UnicodeDecodeError):
        raise BadRecordError(
            f": {text_key} is not valid UTF-8 at byte {value.start} ({value.reason}): repair the "
            "input."
        )
    return check_text(value, text_key)
