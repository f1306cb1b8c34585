"""Tokens for programs of others: parquet of ids, and the `.bin` of nanoGPT and of llm.c.

Each file holds the tokens of a stream in its order, whatever shards they lie in, and says or has a
`.json` beside it that says which stream they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import check_free_space, format_json, open_whole_file, write_errors
from megatron_mdm.data.manifest import Record
from megatron_mdm.data.source import IntArray, split_range
from megatron_mdm.data.store import TokenStore, open_tokens

_LOG = logging.getLogger(__name__)

Format = Literal["parquet", "nanogpt", "llm.c"]
FORMATS: tuple[Format, ...] = get_args(Format)

_UINT16 = np.dtype("<u2")
_LLM_C_MAGIC = 20240520
_LLM_C_VERSION = 1
_LLM_C_HEADER_ITEMS = 256
_MAX_LLM_C_TOKENS = np.iinfo(np.int32).max
# A document that is longer than this gets a row group of its own.
_ROW_GROUP_TOKENS = 1 << 22
_ROW_GROUP_DOCUMENTS = 1 << 16
_REMEDY = "write the shards again with mdm prepare --overwrite."


class ExportRecord(Record):
    """What an exported file holds: in a raw file's `.json`, in the metadata of a parquet file.

    Attributes:
        format: The format of the file.
        source: The path of the shards or the view without extension, as it was given.
        source_fingerprint: What its `TokenSource.fingerprint` gave.
        num_documents: The documents.
        num_tokens: The tokens, ends of documents included.
        dtype: The numpy name of the integer type of a token in the file.
        tokenizer: The tokenizer's name as the shards' manifest has it; this and what follows is
            None for shards without a manifest.
        tokenizer_sha256: The hash of the tokenizer's canonical serialisation.
        vocab_size: The tokenizer's largest token id plus one.
        eod_token_id: The id that ends a document.
        append_eod: Whether every document ends with it; the last one of a subset may be cut.
        prepend_eod: Whether every document begins with it instead; left out where none does.
    """

    what = "the description of exported tokens"

    format: Format
    source: str
    source_fingerprint: str
    num_documents: int
    num_tokens: int
    dtype: str
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    eod_token_id: int | None = None
    append_eod: bool | None = None
    prepend_eod: bool = Field(default=False, exclude_if=lambda value: not value)


def export_tokens(
    prefix: Path, output: Path, file_format: Format, overwrite: bool = False
) -> ExportRecord:
    """Writes the tokens of shards or a view to a file that other programs read.

    The file appears whole or not at all. Memory grows with the longest document for parquet, where
    a document is a row, and with nothing for the raw formats.

    Args:
        prefix: The shards or the view, without extension.
        output: The file. A raw one gets a `.json` beside it, at its path with `.json` after it, and
            that of a raw file is removed where a parquet file takes its place.
        file_format: "parquet": the column `input_ids`; "nanogpt": the bare stream; "llm.c": the
            stream after a header of 256 int32.
        overwrite: Whether to replace what is at these paths.

    Returns:
        What was written.

    Raises:
        DataError: The shards do not open or are damaged, a token id or their number does not fit
            the format, something is at the output, or it cannot be written.
    """
    source = open_tokens(prefix)
    is_raw = file_format != "parquet"
    told = record_path(output)
    with write_errors(output):
        # A parquet file describes itself: the description of a raw file that it replaces goes.
        is_told = is_raw or _describes_a_raw_file(told)
        _check_output(source, [output, told] if is_told else [output], overwrite)
    if file_format == "llm.c":
        _check_llm_c_count(source)
    source.verify()
    dtype = np.dtype(_choose_dtype(source, file_format))
    record = _make_record(source, file_format, dtype)
    _tell_what_is_lost(source, is_raw)
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if is_raw:
            needed_bytes = source.num_tokens * dtype.itemsize
            check_free_space(
                output.parent, needed_bytes, "the tokens need", "choose another --output"
            )
            _write_raw(source, dtype, record, output)
        else:
            with open_whole_file(output) as out:
                _write_parquet(source, dtype, record, out)
                out.flush()
                if is_told:
                    told.unlink(missing_ok=True)
    return record


def record_path(output: Path) -> Path:
    """Names the description of a raw file.

    Args:
        output: The raw file.

    Returns:
        Its path with `.json` after it.
    """
    return Path(f"{output}.json")


def _check_output(source: TokenStore, paths: list[Path], overwrite: bool) -> None:
    mine = {path.resolve() for path in source.files}
    for path in paths:
        if path.resolve() in mine:
            raise DataError(f"{path} is a file of what is exported: choose another --output.")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file: choose another --output.")
        if path.exists() and not overwrite:
            raise DataError(
                f"{path} exists: replace it with --overwrite or choose another --output."
            )


def _choose_dtype(source: TokenStore, file_format: Format) -> npt.DTypeLike:
    """Chooses the type of a token; equal for all subsets of shards with a manifest."""
    if source.dtype in (np.uint8, np.uint16) or file_format == "llm.c":
        return _UINT16
    if file_format == "parquet":
        return "<i4"
    limit = np.iinfo(_UINT16).max + 1
    if source.manifest is not None:
        return _UINT16 if source.manifest.vocab_size <= limit else "<u4"
    return _UINT16 if source.find_token_outside(limit) is None else "<u4"


def _make_record(source: TokenStore, file_format: Format, dtype: np.dtype[Any]) -> ExportRecord:
    manifest = source.manifest
    names = {"tokenizer", "tokenizer_sha256", "vocab_size"}
    names |= {"eod_token_id", "append_eod", "prepend_eod"}
    return ExportRecord(
        format=file_format,
        source=str(source.prefix),
        source_fingerprint=source.fingerprint(),
        num_documents=source.num_documents,
        num_tokens=source.num_tokens,
        dtype=dtype.name,
        **(manifest.model_dump(include=names) if manifest is not None else {}),
    )


def _describes_a_raw_file(path: Path) -> bool:
    """Tells the description of an exported file from what a user may keep under such a name."""
    try:
        return path.is_file() and bool(ExportRecord.read(path))
    except DataError:
        return False


def _tell_what_is_lost(source: TokenStore, is_raw: bool) -> None:
    manifest = source.manifest
    if is_raw and (manifest is None or not (manifest.append_eod or manifest.prepend_eod)):
        why = "there is no manifest" if manifest is None else "append_eod is false in its manifest"
        _LOG.info(
            "%s: documents may not end with an end-of-document id (%s), and a raw file shows no "
            "other boundary",
            source.prefix,
            why,
        )
    if manifest is not None and manifest.exchanges is not None:
        _LOG.info(
            "%s holds prompts with responses, and where responses start is not exported",
            source.prefix,
        )


def _check_llm_c_count(source: TokenStore) -> None:
    if source.num_tokens > _MAX_LLM_C_TOKENS:
        raise DataError(
            f"{source.prefix} has {source.num_tokens} tokens and the header of --format llm.c "
            f"counts up to {_MAX_LLM_C_TOKENS}: export a subset or use --format nanogpt."
        )


def _write_raw(
    source: TokenStore, dtype: np.dtype[Any], record: ExportRecord, output: Path
) -> None:
    path = record_path(output)
    with open_whole_file(path) as told:
        told.write(record.model_dump_json(indent=2).encode() + b"\n")
        told.flush()
        with open_whole_file(output) as out:
            if record.format == "llm.c":
                header = np.zeros(_LLM_C_HEADER_ITEMS, dtype="<i4")
                header[:3] = _LLM_C_MAGIC, _LLM_C_VERSION, source.num_tokens
                out.write(header.data)
            for start, stop in split_range(source.num_tokens):
                out.write(_read(source, start, stop, dtype).data)
            out.flush()
            # At no moment may the description of an older file lie beside the new one.
            path.unlink(missing_ok=True)


def _read(source: TokenStore, start: int, stop: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Copies a part of the stream in another type, in chunks, since what is read is int64."""
    ids = np.empty(stop - start, dtype=dtype)
    for low, high in split_range(stop - start):
        chunk = source.read(start + low, start + high)
        wrong = np.flatnonzero((chunk < 0) | (chunk > np.iinfo(dtype).max))
        if wrong.size:
            raise _misfit_error(source, start + low + int(wrong[0]), int(chunk[wrong[0]]), dtype)
        ids[low:high] = chunk
    return ids


def _misfit_error(
    source: TokenStore, position: int, token_id: int, dtype: np.dtype[Any]
) -> DataError:
    told = f"{source.prefix} has token id {token_id} at position {position}"
    if token_id < 0:
        return DataError(f"{told}, and ids start at 0: {_REMEDY}")
    is_known = source.manifest is None or token_id < source.manifest.vocab_size
    remedy = "use --format nanogpt or parquet." if dtype == _UINT16 and is_known else _REMEDY
    return DataError(f"{told}, which does not fit the file's {dtype.name}: {remedy}")


def _divide_into_row_groups(source: TokenStore) -> Iterator[tuple[int, IntArray]]:
    """Yields the first token and the lengths of the documents of each row group, none empty."""
    first = 0
    for start in range(0, source.num_documents, _ROW_GROUP_DOCUMENTS):
        stop = min(start + _ROW_GROUP_DOCUMENTS, source.num_documents)
        lengths = source.locate_documents(np.arange(start, stop))[:, 2]
        while lengths.size:
            fitting = int(np.searchsorted(lengths.cumsum(), _ROW_GROUP_TOKENS, side="right"))
            group, lengths = np.split(lengths, [max(fitting, 1)])
            yield first, group
            first += int(group.sum())


def _write_parquet(
    source: TokenStore, dtype: np.dtype[Any], record: ExportRecord, out: BinaryIO
) -> None:
    # Slow to import, and only this format needs it.
    import pyarrow
    import pyarrow.parquet

    metadata = {
        name: value if isinstance(value, str) else format_json(value)
        for name, value in record.model_dump(exclude_none=True).items()
    }
    column = pyarrow.field("input_ids", pyarrow.list_(pyarrow.from_numpy_dtype(dtype)))
    schema = pyarrow.schema([column], metadata=metadata)
    with pyarrow.parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        for first, lengths in _divide_into_row_groups(source):
            ends = np.concatenate([[0], lengths.cumsum()])
            ids = pyarrow.array(_read(source, first, first + int(ends[-1]), dtype))
            offsets = pyarrow.array(ends.astype(np.int32))
            rows = pyarrow.ListArray.from_arrays(offsets, ids)
            writer.write_table(pyarrow.Table.from_arrays([rows], schema=schema))
