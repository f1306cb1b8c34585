"""Documents that are token ids already: read out of chunks, checked, ended, divided."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.division import EncodedChunk, divide, is_small_hash
from megatron_mdm.corpus.encoding import EncodedBatch
from megatron_mdm.corpus.records import BadRecord, parse_objects, unknown_key
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

    def chosen(self, is_good: npt.NDArray[np.bool_], bad: list[BadRecord]) -> IdRows:
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


@dataclass(frozen=True)
class IdsReader:
    """Reads and checks chunks of ids.

    Attributes:
        ids_key: The JSON key or column of the ids; None for files of tokens.
        serialised: The tokenizer, by `Tokenizer.to_str`; needed to divide by text alone.
        dtype: The numpy name of the shards' type.
        vocab_size: The tokenizer's largest id plus one.
        eod_token_id: The id that ends a document.
        is_cut: Whether the documents were cut after that id, so that none holds it inside.
        is_copied: Whether the tokens are written anew: then every document ends with that id.
            Otherwise they have to be right as they are.
        drops_empty: Whether documents that are nothing but that id are left out.
        append_eod: Whether documents have to end with that id.
        valid_fraction: The share of documents to hold out, None for no division.
        hold_out_by: What is hashed for it.
        skip_bad_records: Whether a chunk with bad records is read without them.
    """

    ids_key: str | None
    serialised: str
    dtype: str
    vocab_size: int
    eod_token_id: int
    is_cut: bool
    is_copied: bool
    drops_empty: bool
    append_eod: bool
    valid_fraction: float | None
    hold_out_by: Literal["ids", "text"]
    skip_bad_records: bool

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Reads and checks a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Its documents and bad records.
        """
        rows = self.read(chunk)
        # A stream with a hole is another stream.
        if rows.bad_records and (chunk.kind == "tokens" or not self.skip_bad_records):
            return EncodedChunk([], rows.bad_records)
        batch = self._as_documents(rows)
        if self.valid_fraction is None:
            return EncodedChunk(divide(batch, None), rows.bad_records)
        return EncodedChunk(divide(batch, self._held_out(batch)), rows.bad_records)

    def read(self, chunk: Chunk) -> IdRows:
        """Reads the documents of a chunk that may be used as they are.

        Args:
            chunk: The chunk.

        Returns:
            Them and bad records.
        """
        return self._checked(read_rows(chunk, self.ids_key or ""))

    def _checked(self, rows: IdRows) -> IdRows:
        """Finds documents that cannot be used as they are."""
        tokens = rows.tokens
        found = _Complaints(rows)
        found.about_documents(
            rows.lengths >= MAX_DOCUMENT_TOKENS,
            f" has {{length}} tokens and a document may have {MAX_DOCUMENT_TOKENS - 1}: split it.",
        )
        is_negative = tokens.dtype.kind == "i" and int(tokens.min(initial=0)) < 0
        if is_negative or int(tokens.max(initial=0)) >= self.vocab_size:
            found.about_ids(
                (tokens < 0) | (tokens >= self.vocab_size),
                f" holds the id {{id}} at place {{place}} of {{length}}, and the tokenizer's are "
                f"below {self.vocab_size}: give the tokenizer that made the ids.",
            )
        if not self.is_cut:
            is_end = tokens == self.eod_token_id
            has_end = rows.lengths > 0
            last = rows.lengths.cumsum()[has_end] - 1
            has_end[has_end] = is_end[last]
            is_end[last] = False
            found.about_ids(
                is_end,
                " holds the end-of-document id {id} inside, at place {place} of {length}: cut such "
                "rows there with --split-at-eod, or name another --eod-token.",
            )
            if self.append_eod and not self.is_copied:
                found.about_documents(
                    ~has_end,
                    f" begins a document of {{length}} tokens that does not end with the "
                    f"end-of-document id {self.eod_token_id}: add it with --copy, or name the "
                    "token that does with --eod-token.",
                )
        return rows.chosen(found.is_good, found.bad_records) if found.bad_records else rows

    def _as_documents(self, rows: IdRows) -> EncodedBatch:
        """Ends documents and leaves out empty ones where tokens are written anew."""
        lengths = rows.lengths
        tokens = rows.tokens.astype(self.dtype, copy=False)
        if self.append_eod and self.is_copied:
            ends = lengths.cumsum()
            has_end = lengths > 0
            has_end[has_end] = tokens[ends[has_end] - 1] == self.eod_token_id
            is_empty = lengths == has_end if self.drops_empty else lengths == 0
            # A stream that was cut has ends where it needs them.
            lacks_end = ~has_end & ~is_empty & (not self.is_cut)
            if lacks_end.any():
                tokens = np.insert(tokens, ends[lacks_end], self.eod_token_id)
                lengths = lengths + lacks_end
            if is_empty.any():
                tokens = tokens[np.repeat(~is_empty, lengths)]
                lengths = np.where(is_empty, 0, lengths)
        return EncodedBatch(tokens, lengths.astype(np.int32))

    def _held_out(self, batch: EncodedBatch) -> npt.NDArray[np.bool_]:
        """Decides by a hash of each document without its end on which side it falls."""
        fraction = self.valid_fraction or 0.0
        documents = []
        for end, length in zip(
            itertools.accumulate(batch.lengths.tolist()), batch.lengths.tolist(), strict=True
        ):
            ids = batch.tokens[end - length : end]
            has_end = length and int(ids[-1]) == self.eod_token_id
            documents.append(ids[: length - 1] if has_end else ids)
        if self.hold_out_by == "text":
            texts = self._tokenizer.decode_batch(
                [ids.tolist() for ids in documents], skip_special_tokens=False
            )
            contents = [text.encode("utf-8") for text in texts]
        else:
            contents = [ids.astype("<i4").tobytes() for ids in documents]
        return np.array([is_small_hash(content, fraction) for content in contents], bool)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.serialised)


class _Complaints:
    """What is wrong with documents, one complaint each: the first that was found."""

    def __init__(self, rows: IdRows) -> None:
        self.is_good = np.ones(len(rows.lengths), bool)
        self.bad_records: list[BadRecord] = []
        self._rows = rows
        self._ends = rows.lengths.cumsum()

    def about_documents(self, is_wrong: npt.NDArray[np.bool_], words: str) -> None:
        """Complains about the documents that are marked; `words` may name {length}."""
        for number in np.flatnonzero(is_wrong & self.is_good).tolist():
            self._add(number, words.format(length=int(self._rows.lengths[number])))

    def about_ids(self, is_wrong: npt.NDArray[np.bool_], words: str) -> None:
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
    found: list[tuple[int, npt.NDArray[Any] | BadRecord]] = []
    for record, fields in parse_objects(chunk):
        if isinstance(fields, BadRecord):
            found.append((record, fields))
        elif ids_key not in fields:
            found.append((record, BadRecord(record, unknown_key(ids_key, fields, "--ids-key"))))
        else:
            ids = _masked(record, fields[ids_key], fields.get(MASK_KEY), ids_key)
            found.append((record, ids))
    return _joined(found)


def _joined(found: Iterable[tuple[int, npt.NDArray[Any] | BadRecord]]) -> IdRows:
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


def _masked(record: int, ids: Any, mask: Any, ids_key: str) -> npt.NDArray[Any] | BadRecord:
    """Checks the ids of one row and drops its padding."""
    try:
        values = np.array(ids)
        if values.size == 0 and isinstance(ids, list):
            values = np.empty(0, np.int64)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, OverflowError):
        return BadRecord(
            record,
            f": {ids_key} is no list of integers: repair the input or choose another --ids-key.",
        )
    if mask is None:
        return values
    if not isinstance(mask, list) or len(mask) != len(values):
        return BadRecord(
            record,
            f": {MASK_KEY} is no list of {len(values)} numbers as {ids_key} is: repair the input.",
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
    ids, lengths = _flat(columns[0])
    records = np.arange(chunk.first_record, chunk.first_record + len(lengths))
    if len(columns) > 1:
        if not is_list[1]:
            raise DataError(f"the column {MASK_KEY!r} holds {columns[1].type}: drop it.")
        mask, mask_lengths = _flat(columns[1])
        if not np.array_equal(lengths, mask_lengths):
            return _read_table_slowly(chunk, columns, ids_key)
        is_kept = mask.astype(bool)
        kept = np.concatenate([[0], is_kept.cumsum()])
        ends = lengths.cumsum()
        ids, lengths = ids[is_kept], kept[ends] - kept[ends - lengths]
    return IdRows(ids, lengths, records, [])


def _flat(column: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    values = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values, lengths


def _read_table_slowly(chunk: Chunk, columns: list[Any], ids_key: str) -> IdRows:
    found = []
    for record, (ids, *mask) in enumerate(zip(*columns, strict=True), start=chunk.first_record):
        masked = mask[0].as_py() if mask else None
        found.append((record, _masked(record, ids.as_py(), masked, ids_key)))
    return _joined(found)
