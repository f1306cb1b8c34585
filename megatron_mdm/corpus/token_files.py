"""Files of tokens that other programs wrote: which format one has, and where its tokens lie.

| Format | Content |
| --- | --- |
| `npy` | NumPy's own header, then a one- or two-dimensional array |
| `llm.c` | 256 int32, then tokens. Magic 20240520, version, number of tokens, all uint16; or |
| | magic 278895051, version, number of tokens, bytes of a token |
| `lit-gpt` | `LITPKDS`, version (uint64), type code (uint8), tokens (uint64), then a chunk; the |
| | last one is filled up with a separator |
| `datatrove` | tokens, and beside them `.index`: the end of each document (uint64) |
| `raw` | tokens and nothing else, as nanoGPT (`.bin`) and OLMo (`.npy`) write them |
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError, first_line
from megatron_mdm.corpus.tokenizer import TokenizerHandle
from megatron_mdm.data.index import check_size
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.source import spread_blocks

FormatName = Literal["npy", "llm.c", "lit-gpt", "datatrove", "raw"]
RawDtype = Literal["uint16", "uint32", "int32"]
_NPY_MAGIC = b"\x93NUMPY"
_LIT_MAGIC = b"LITPKDS"
_LIT_HEADER = struct.Struct("<7sQBQ")
_LIT_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C_INTEGERS = 256
_LLM_C_UINT16, _LLM_C_SIZED = 20240520, 278895051
_SIZED_DTYPES = {1: "|u1", 2: "<u2", 4: "<u4"}
_COPY_AGAIN = "copy or write it again"
_NUM_SPOTS, _SPOT_BYTES = 64, 4096
_FILL_TOKENS = 1 << 16


class TokenFile(NamedTuple):
    """A file of tokens.

    Attributes:
        path: The file.
        format: Its format.
        dtype: The integer type of a token.
        offset_bytes: Where the tokens start.
        num_tokens: The tokens, without what fills up a chunk.
        row_tokens: The tokens of a row of a two-dimensional array, else None.
    """

    path: Path
    format: FormatName
    dtype: np.dtype[Any]
    offset_bytes: int
    num_tokens: int
    row_tokens: int | None = None

    def describe(self) -> str:
        """What was recognised, for a line of text."""
        shape = "" if self.row_tokens is None else f" in rows of {self.row_tokens}"
        return f"{self.path}: {self.format}, {self.num_tokens} tokens of {self.dtype.name}{shape}"

    def read(self, start: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Reads some tokens, of the file's type.

        Args:
            start: The first one.
            count: How many; the file has to hold them.

        Raises:
            DataError: The file has become shorter, or the storage fails.
        """
        place = self.offset_bytes + start * self.dtype.itemsize
        return PositionalFile(self.path).read(self.dtype, place, count)


def open_token_file(
    path: Path,
    tokenizer: TokenizerHandle,
    told: FormatName | None = None,
    dtype: RawDtype | None = None,
) -> TokenFile:
    """Recognises a file of tokens by its content.

    Args:
        path: The file.
        tokenizer: What made the tokens.
        told: The format; None to look for it.
        dtype: The type of raw tokens, None to look for it.

    Returns:
        The file.

    Raises:
        DataError: It is damaged, no integers, of another format than told, or half of a pair of
            Megatron shards.
    """
    file = PositionalFile(path)
    head = file.read("u1", 0, min(file.size_bytes, 1024)).tobytes()
    found = _recognize_format(path, head)
    if told is not None and found != told and told != "raw":
        raise DataError(
            f"{path} has the format {found} and --format={told} was given: leave it out or correct "
            "it."
        )
    if dtype is not None and (told or found) != "raw":
        raise DataError(f"--dtype={dtype} is for raw tokens and {path} is {found}: leave it out.")
    match told or found:
        case "npy":
            return _open_npy(path, file)
        case "llm.c":
            return _open_llm_c(path, file, head)
        case "lit-gpt":
            return _cut_off_fill(_open_lit(path, file, head), tokenizer)
        case "datatrove":
            return _open_datatrove(path, file)
    return _open_raw(path, file, tokenizer.vocab_size, dtype)


def ends_path(path: Path) -> Path:
    """Names the file in which datatrove keeps the ends of the documents.

    Args:
        path: The file of tokens.

    Returns:
        The path with `.index` after it.
    """
    return Path(f"{path}.index")


def _recognize_format(path: Path, head: bytes) -> FormatName:
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.is_file():
        raise DataError(
            f"{path} and {index} are Megatron shards, which need no preprocessing: name "
            f"{path.with_suffix('')} as data.train or data.valid, or give it to "
            "mdm subset."
        )
    if head.startswith(_NPY_MAGIC):
        return "npy"
    if head.startswith(_LIT_MAGIC):
        return "lit-gpt"
    if len(head) == 4 * _LLM_C_INTEGERS:
        magic = int(np.frombuffer(head, "<i4")[0])
        if magic in (_LLM_C_UINT16, _LLM_C_SIZED):
            return "llm.c"
    return "datatrove" if ends_path(path).is_file() else "raw"


def _open_npy(path: Path, file: PositionalFile) -> TokenFile:
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = read(stream)
            offset_bytes = stream.tell()
    # A damaged header goes through Python's own parser, which raises many things.
    except Exception as error:
        raise DataError(
            f"{path} has a damaged header ({first_line(error)}): {_COPY_AGAIN}."
        ) from error
    if dtype.kind not in "iu":
        what = "Python objects, which may run code" if dtype.hasobject else f"{dtype}"
        raise DataError(
            f"{path} holds {what} and token ids are integers: save it as an array of uint16 or "
            "int32 of one or two dimensions, with the end-of-document id after each document."
        )
    if len(shape) not in (1, 2) or (is_fortran and len(shape) == 2):
        order = " in columns" if is_fortran else ""
        raise DataError(
            f"{path} is an array of {len(shape)} dimensions{order} and token ids have one or two, "
            "row after row: reshape it."
        )
    num_tokens = int(np.prod(shape, dtype=np.int64))
    _check_tokens(path, file.size_bytes, offset_bytes, num_tokens, dtype)
    row_tokens = int(shape[1]) if len(shape) == 2 else None
    return TokenFile(path, "npy", dtype, offset_bytes, num_tokens, row_tokens)


def _open_llm_c(path: Path, file: PositionalFile, head: bytes) -> TokenFile:
    magic, version, num_tokens, token_bytes = np.frombuffer(head, "<i4")[:4].tolist()
    if magic == _LLM_C_UINT16:
        token_bytes = 2
    if token_bytes not in _SIZED_DTYPES:
        raise DataError(
            f"{path} has a header of version {version} with {token_bytes} bytes per token, and 1, "
            f"2 and 4 are known: {_COPY_AGAIN}, or give --format raw."
        )
    dtype = np.dtype(_SIZED_DTYPES[token_bytes])
    _check_tokens(path, file.size_bytes, len(head), num_tokens, dtype)
    return TokenFile(path, "llm.c", dtype, len(head), num_tokens)


def _open_lit(path: Path, file: PositionalFile, head: bytes) -> TokenFile:
    if len(head) < _LIT_HEADER.size:
        raise DataError(f"{path} ends within its header: {_COPY_AGAIN}.")
    _, version, code, num_tokens = _LIT_HEADER.unpack_from(head)
    if version != 1 or code not in _LIT_DTYPES:
        raise DataError(
            f"{path} is a packed chunk of version {version} and type code {code}: version 1 and "
            f"the codes {', '.join(map(str, _LIT_DTYPES))} can be read; {_COPY_AGAIN}."
        )
    dtype = np.dtype(_LIT_DTYPES[code])
    _check_tokens(path, file.size_bytes, _LIT_HEADER.size, num_tokens, dtype)
    return TokenFile(path, "lit-gpt", dtype, _LIT_HEADER.size, num_tokens)


def _cut_off_fill(file: TokenFile, tokenizer: TokenizerHandle) -> TokenFile:
    """Cuts off what fills up a last chunk: two or more of one special token at the end.

    If that token ends documents, one of them is the end of the last document.
    """
    kept, fill = file.num_tokens, None
    while kept:
        block = file.read(max(0, kept - _FILL_TOKENS), min(kept, _FILL_TOKENS))
        fill = int(block[-1]) if fill is None else fill
        others = np.flatnonzero(block != fill)
        if len(others):
            kept -= len(block) - 1 - int(others[-1])
            break
        kept -= len(block)
    is_fill = file.num_tokens - kept >= 2 and fill in {
        *tokenizer.special_tokens.values(),
        tokenizer.eod_token_id,
    }
    if not is_fill:
        return file
    return file._replace(num_tokens=kept + (fill == tokenizer.eod_token_id))


def _open_datatrove(path: Path, file: PositionalFile) -> TokenFile:
    index = PositionalFile(ends_path(path))
    num_documents, rest = divmod(index.size_bytes, 8)
    num_tokens = 0
    if num_documents and not rest:
        num_tokens = int(index.read("<u8", index.size_bytes - 8, 1)[0])
    sizes = {num_tokens * 2: "<u2", num_tokens * 4: "<u4"}
    if rest or (num_tokens and file.size_bytes not in sizes):
        raise DataError(
            f"{path} has {file.size_bytes} bytes and {index.path} counts {num_tokens} tokens of 2 "
            f"or 4 bytes: {_COPY_AGAIN}, both of them."
        )
    dtype = np.dtype(sizes.get(file.size_bytes, "<u2"))
    return TokenFile(path, "datatrove", dtype, 0, num_tokens)


def _open_raw(
    path: Path, file: PositionalFile, vocab_size: int, dtype: RawDtype | None
) -> TokenFile:
    if dtype is None:
        dtype = _guess_raw_dtype(file, vocab_size)
    if dtype is None:
        raise DataError(
            f"{path} has no format that is known, and neither uint16 nor uint32 gives ids below "
            f"the tokenizer's {vocab_size}: give the right --tokenizer, or --dtype and --format."
        )
    kind = np.dtype(dtype).newbyteorder("<")
    num_tokens, rest = divmod(file.size_bytes, kind.itemsize)
    if rest:
        raise DataError(
            f"{path} has {file.size_bytes} bytes, which are no whole number of {dtype}: give "
            f"another --dtype, or {_COPY_AGAIN}."
        )
    return TokenFile(path, "raw", kind, 0, num_tokens)


def _guess_raw_dtype(file: PositionalFile, vocab_size: int) -> RawDtype | None:
    """Looks at 64 places: read with the wrong width, ids are half zeros, or far too large."""
    length = min(file.size_bytes, _SPOT_BYTES)
    starts = {start // 4 * 4 for start in spread_blocks(file.size_bytes, length, _NUM_SPOTS)}
    content = b"".join(file.read("u1", start, length // 4 * 4).tobytes() for start in starts)
    candidates: tuple[RawDtype, RawDtype] = ("uint32", "uint16")
    for dtype in candidates:
        ids = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))
        if file.size_bytes % ids.itemsize == 0 and ids.max(initial=0) < vocab_size:
            return dtype
    return None


def _check_tokens(
    path: Path, size_bytes: int, offset_bytes: int, num_tokens: int, dtype: np.dtype[Any]
) -> None:
    content = f"a header and its {num_tokens} tokens of {dtype.name}"
    expected_bytes = offset_bytes + num_tokens * dtype.itemsize
    check_size(path, size_bytes, expected_bytes, content, f"{_COPY_AGAIN}.")
