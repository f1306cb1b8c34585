"""Documents that are token ids already: read out of chunks, checked, ended, divided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.chunk_reader import ChunkReader, EncodedChunk
from megatron_mdm.corpus.encoding import EncodedBatch
from megatron_mdm.corpus.records import (
    BadRecord,
    BadRecordError,
    parse_each,
    parse_objects,
    pick_value,
)
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.data.index import MAX_DOCUMENT_TOKENS

MASK_KEY = "attention_mask"


class IdRows(NamedTuple):
    """Documents of ids as a chunk holds them.

    Attributes:
        tokens: All ids in a row, of any integer type, shape [sum of lengths].
        lengths: The ids of each document, int64, shape [documents].
        records: The number of the record of each.
        bad_records: The other records, in order.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    records: npt.NDArray[np.int64]
    bad_records: list[BadRecord]

    def select(self, is_good: npt.NDArray[np.bool_], bad: list[BadRecord]) -> IdRows:
        """Keeps some documents.

        Args:
            is_good: Which, bool [documents].
            bad: What is wrong with the others.

        Returns:
            The documents kept.
        """
        every = sorted([*self.bad_records, *bad], key=lambda record: record.record)
        tokens = self.tokens[np.repeat(is_good, self.lengths)]
        return IdRows(tokens, self.lengths[is_good], self.records[is_good], every)


@dataclass(frozen=True, kw_only=True)
class IdsReader(ChunkReader):
    """Reads and checks chunks of ids.

    Attributes:
        ids_key: The JSON key or column of the ids; None for files of tokens.
        vocab_size: The tokenizer's largest id plus one.
        is_cut: Whether the documents were cut after the end-of-document id, so that none holds it
            inside.
        is_copied: Whether the tokens are written anew: then every document ends with that id.
            Otherwise they have to be right as they are.
        drops_empty: Whether documents that are nothing but that id are left out.
        hold_out_by: What is hashed to divide the documents.
    """

    ids_key: str | None
    vocab_size: int
    is_cut: bool
    is_copied: bool
    drops_empty: bool
    hold_out_by: Literal["ids", "text"]

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """See `ChunkReader.encode`."""
        rows = self.read(chunk)
        # Leaving out a part of a stream would join what does not belong together.
        if rows.bad_records and (chunk.kind == "tokens" or not self.settings.skip_bad_records):
            return EncodedChunk([], rows.bad_records)
        batch = self._end_documents(rows)
        return self._divide(batch, self._list_contents(batch), rows.bad_records)

    def read(self, chunk: Chunk) -> IdRows:
        """Reads the documents of a chunk that may be used as they are.

        Args:
            chunk: The chunk.

        Returns:
            Them and bad records.
        """
        return self._check(read_rows(chunk, self.ids_key or ""))

    def _check(self, rows: IdRows) -> IdRows:
        """Finds documents that cannot be used as they are."""
        tokens = rows.tokens
        found = _Complaints(rows)
        found.mark_documents(
            rows.lengths >= MAX_DOCUMENT_TOKENS,
            f" has {{length}} tokens and a document may have {MAX_DOCUMENT_TOKENS - 1}: split it.",
        )
        is_negative = tokens.dtype.kind == "i" and int(tokens.min(initial=0)) < 0
        if is_negative or int(tokens.max(initial=0)) >= self.vocab_size:
            found.mark_ids(
                (tokens < 0) | (tokens >= self.vocab_size),
                f" holds the id {{id}} at place {{place}} of {{length}}, and the tokenizer's are "
                f"below {self.vocab_size}: give the tokenizer that made the ids.",
            )
        if not self.is_cut:
            is_end = tokens == self.settings.eod_token_id
            has_end = rows.lengths > 0
            last = rows.lengths.cumsum()[has_end] - 1
            has_end[has_end] = is_end[last]
            is_end[last] = False
            found.mark_ids(
                is_end,
                " holds the end-of-document id {id} inside, at place {place} of {length}: cut such "
                "rows there with --split-at-eod, or name another --eod-token.",
            )
            if self.settings.append_eod and not self.is_copied:
                found.mark_documents(
                    ~has_end,
                    f" begins a document of {{length}} tokens that does not end with the "
                    f"end-of-document id {self.settings.eod_token_id}: add it with --copy, or name "
                    "the token that does with --eod-token.",
                )
        return rows.select(found.is_good, found.bad_records) if found.bad_records else rows

    def _end_documents(self, rows: IdRows) -> EncodedBatch:
        """Ends documents and leaves out empty ones where tokens are written anew."""
        lengths = rows.lengths
        tokens = rows.tokens.astype(self.settings.dtype, copy=False)
        if self.settings.append_eod and self.is_copied:
            ends = lengths.cumsum()
            has_end = lengths > 0
            has_end[has_end] = tokens[ends[has_end] - 1] == self.settings.eod_token_id
            is_empty = lengths == has_end if self.drops_empty else lengths == 0
            # Documents that were cut out of a stream end with its own ends.
            lacks_end = ~has_end & ~is_empty & (not self.is_cut)
            if lacks_end.any():
                tokens = np.insert(tokens, ends[lacks_end], self.settings.eod_token_id)
                lengths = lengths + lacks_end
            if is_empty.any():
                tokens = tokens[np.repeat(~is_empty, lengths)]
                lengths = np.where(is_empty, 0, lengths)
        return EncodedBatch(tokens, lengths.astype(np.int32))

    def _list_contents(self, batch: EncodedBatch) -> Iterator[bytes]:
        """What is hashed of each document: its ids without its end, or their text."""
        documents = []
        for ids in np.split(batch.tokens, batch.lengths.cumsum(dtype=np.int64))[:-1]:
            has_end = len(ids) and int(ids[-1]) == self.settings.eod_token_id
            documents.append(ids[:-1] if has_end else ids)
        if self.hold_out_by == "ids":
            yield from (ids.astype("<i4").tobytes() for ids in documents)
            return
        lists = [ids.tolist() for ids in documents]
        for text in self._tokenizer.decode_batch(lists, skip_special_tokens=False):
            yield text.encode("utf-8")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.settings.serialised)


class _Complaints:
    """What is wrong with documents, one complaint each: the first that was found."""

    def __init__(self, rows: IdRows) -> None:
        self.is_good = np.ones(len(rows.lengths), bool)
        self.bad_records: list[BadRecord] = []
        self._rows = rows
        self._ends = rows.lengths.cumsum()

    def mark_documents(self, is_wrong: npt.NDArray[np.bool_], words: str) -> None:
        """Complains about the documents that are marked; `words` may name {length}."""
        for number in np.flatnonzero(is_wrong & self.is_good).tolist():
            self._add(number, words.format(length=int(self._rows.lengths[number])))

    def mark_ids(self, is_wrong: npt.NDArray[np.bool_], words: str) -> None:
        """Complains about the first marked id of a document; names {id}, {place} and {length}."""
        places = np.flatnonzero(is_wrong)
        numbers, firsts = np.unique(
            np.searchsorted(self._ends, places, side="right"), return_index=True
        )
        for number, place in zip(numbers.tolist(), places[firsts].tolist(), strict=True):
            if self.is_good[number]:
                length = int(self._rows.lengths[number])
                before = int(self._ends[number]) - length
                identity = int(self._rows.tokens[place])
                self._add(number, words.format(id=identity, place=place - before, length=length))

    def _add(self, number: int, words: str) -> None:
        self.bad_records.append(BadRecord(int(self._rows.records[number]), words))
        self.is_good[number] = False


def read_rows(chunk: Chunk, ids_key: str) -> IdRows:
    """Reads the documents of a chunk of ids.

    Args:
        chunk: A chunk of lines, rows or tokens.
        ids_key: The JSON key or column that holds the ids.

    Returns:
        The documents, without padding where there is an `attention_mask`, and bad records.
    """
    if chunk.tokens is not None and chunk.lengths is not None:
        records = chunk.first_record + chunk.lengths.cumsum() - chunk.lengths
        return IdRows(chunk.tokens, chunk.lengths, records, [])
    if chunk.kind == "rows":
        return _read_table(chunk, ids_key)
    return _read_lines(chunk, ids_key)


def _read_lines(chunk: Chunk, ids_key: str) -> IdRows:
    def parse(fields: dict[str, Any]) -> npt.NDArray[Any]:
        ids = pick_value(fields, ids_key, "--ids-key")
        return _drop_padding(ids, fields.get(MASK_KEY), ids_key)

    return _join_rows(parse_objects(chunk, parse))


def _join_rows(found: Iterable[tuple[int, npt.NDArray[Any] | BadRecord]]) -> IdRows:
    rows, bad, records = [], [], []
    for record, ids in found:
        if isinstance(ids, BadRecord):
            bad.append(ids)
        else:
            rows.append(ids)
            records.append(record)
    lengths = np.array([len(ids) for ids in rows], np.int64)
    tokens = np.concatenate([np.empty(0, np.int64), *rows])
    return IdRows(tokens, lengths, np.array(records, np.int64), bad)


def _drop_padding(ids: Any, mask: Any, ids_key: str) -> npt.NDArray[Any]:
    """Checks the ids of one row and drops its padding."""
    try:
        values = np.array(ids)
        if values.size == 0 and isinstance(ids, list):
            values = np.empty(0, np.int64)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, OverflowError):
        raise BadRecordError(
            f": {ids_key} is no list of integers: repair the input or choose another --ids-key."
        ) from None
    if mask is None:
        return values
    if not isinstance(mask, list) or len(mask) != len(values):
        raise BadRecordError(
            f": {MASK_KEY} is no list of {len(values)} numbers as {ids_key} is: repair the input."
        )
    is_kept: npt.NDArray[np.bool_] = np.array(mask, bool)
    kept: npt.NDArray[Any] = values[is_kept]
    return kept


def _read_table(chunk: Chunk, ids_key: str) -> IdRows:
    import pyarrow

    with pyarrow.ipc.open_stream(chunk.data) as stream:
        table = stream.read_all()
    columns = [table.column(number).combine_chunks() for number in range(table.num_columns)]
    kinds = pyarrow.types
    is_list = [
        kinds.is_list(column.type)
        or kinds.is_large_list(column.type)
        or kinds.is_fixed_size_list(column.type)
        for column in columns
    ]
    if not is_list[0] or not kinds.is_integer(columns[0].type.value_type):
        raise DataError(
            f"the column {ids_key!r} holds {columns[0].type} and ids are lists of integers: choose "
            "another --ids-key."
        )
    # Row by row where something is missing, so that the row can be named.
    if any(column.null_count or column.flatten().null_count for column in columns):
        return _read_table_slowly(chunk, columns, ids_key)
    ids, lengths = _flatten(columns[0])
    records = np.arange(chunk.first_record, chunk.first_record + len(lengths))
    if len(columns) > 1:
        if not is_list[1]:
            raise DataError(f"the column {MASK_KEY!r} holds {columns[1].type}: drop it.")
        mask, mask_lengths = _flatten(columns[1])
        if not np.array_equal(lengths, mask_lengths):
            return _read_table_slowly(chunk, columns, ids_key)
        is_kept = mask.astype(bool)
        kept = np.concatenate([[0], is_kept.cumsum()])
        ends = lengths.cumsum()
        ids, lengths = ids[is_kept], kept[ends] - kept[ends - lengths]
    return IdRows(ids, lengths, records, [])


def _flatten(column: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    values = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values, lengths


def _read_table_slowly(chunk: Chunk, columns: list[Any], ids_key: str) -> IdRows:
    def parse(row: tuple[Any, ...]) -> npt.NDArray[Any]:
        ids, *mask = row
        return _drop_padding(ids.as_py(), mask[0].as_py() if mask else None, ids_key)

    rows = enumerate(zip(*columns, strict=True), start=chunk.first_record)
    return _join_rows(parse_each(rows, parse))
