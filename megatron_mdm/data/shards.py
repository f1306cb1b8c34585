"""Token shards: the `.bin` and `.idx` pair that Megatron-Core's datasets read and write.

`.bin` is every token of every sequence in a row. `.idx` is, little-endian: a magic of 9 bytes,
version (uint64), dtype code (uint8), the number of sequences and the number of document indices
(uint64 each); then each sequence's length (int32), each sequence's byte offset (int64), and the
document indices (int64): a 0, then for each document the number of sequences up to its end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOAT_DTYPES = {6: "float64", 7: "float32"}
CHUNK_ITEMS = 1 << 20
MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max
_REMEDY = "write the shards again with tools/preprocess_data.py --overwrite."


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Chooses the smallest token type by Megatron-Core's rule, so that both make equal files.

    Args:
        vocab_size: The number of token ids, at least 1.

    Returns:
        uint16 below 65,500 ids (Megatron's bound, a little under what fits), otherwise int32.
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """Names the file of tokens of a pair of shards.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        The prefix with `.bin` after it.
    """
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Names the index of a pair of shards.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        The prefix with `.idx` after it.
    """
    return Path(f"{prefix}.idx")


@dataclass(frozen=True, eq=False)
class TokenShards:
    """A checked pair of shards, mapped into memory. Make it with `TokenShards.open`.

    Attributes:
        prefix: The path of the shards without `.bin` and `.idx`.
        dtype: The integer type of a token.
        num_documents: The documents.
        num_tokens: The tokens of all documents, at least 1.
        manifest: What `tools/preprocess_data.py` wrote beside them; None for shards of others.
        document_lengths: Tokens of each document, int32, shape [num_documents].
        tokens: The whole stream, shape [num_tokens], read from disk as it is used.
    """

    prefix: Path
    dtype: np.dtype[Any]
    num_documents: int
    num_tokens: int
    manifest: Manifest | None
    document_lengths: npt.NDArray[np.int32]
    tokens: np.memmap[Any, np.dtype[Any]]

    @classmethod
    def open(cls, prefix: Path | str) -> TokenShards:
        """Opens a pair of shards and checks that both files are whole and agree.

        Args:
            prefix: The path of the shards without `.bin` and `.idx`.

        Returns:
            The shards.

        Raises:
            DataError: A file is missing, truncated, too long or of another format, the files
                contradict each other or their manifest, or there are no tokens.
        """
        prefix = Path(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist: give the path of the shards without .bin or .idx, "
                    "or make them with tools/preprocess_data.py."
                )
        dtype, num_tokens, document_lengths = _read_index(idx_path(prefix))
        expected_bytes = num_tokens * dtype.itemsize
        _check_size(bin_path(prefix), expected_bytes, f"{num_tokens} tokens of {dtype}")
        if not num_tokens:
            raise DataError(f"{bin_path(prefix)} holds no tokens: {_REMEDY}")
        manifest = None
        if manifest_path(prefix).exists():
            manifest = Manifest.read(manifest_path(prefix))
            told = (manifest.num_documents, manifest.num_tokens, manifest.dtype)
            found = (len(document_lengths), num_tokens, dtype.name)
            if told != found:
                raise DataError(
                    f"{manifest_path(prefix)} describes {told[0]} documents, {told[1]} tokens "
                    f"of {told[2]}, and the shards hold {found[0]}, {found[1]} of {found[2]}: "
                    f"{_REMEDY}"
                )
        return cls(
            prefix=prefix,
            dtype=dtype,
            num_documents=len(document_lengths),
            num_tokens=num_tokens,
            manifest=manifest,
            document_lengths=document_lengths,
            tokens=np.memmap(bin_path(prefix), dtype=dtype, mode="r", shape=(num_tokens,)),
        )

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Copies a part of the stream.

        Args:
            start: The first token, 0 or more.
            length: The number of tokens, 0 or more.

        Returns:
            The token ids, int64, shape [length].

        Raises:
            IndexError: The part reaches outside the stream.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"tokens {start} to {start + length} of {self.prefix} with {self.num_tokens}"
            )
        return np.asarray(self.tokens[start : start + length]).astype(np.int64)

    def find_token_at_or_above(self, limit: int) -> tuple[int, int] | None:
        """Looks through the whole stream for a token id that a vocabulary does not have.

        Args:
            limit: The smallest id that counts as found.

        Returns:
            The position in tokens and the id of the first one, or None.
        """
        for start in range(0, self.num_tokens, CHUNK_ITEMS):
            chunk = self.tokens[start : start + CHUNK_ITEMS]
            found = np.flatnonzero(chunk >= limit)
            if found.size:
                return start + int(found[0]), int(chunk[found[0]])
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry every token to each worker of a loader.
        return TokenShards.open, (self.prefix,)


def _check_size(path: Path, expected_bytes: int, content: str) -> None:
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        state = "truncated" if actual_bytes < expected_bytes else "too long"
        raise DataError(
            f"{path} is {state}: it has {actual_bytes} bytes and {content} take "
            f"{expected_bytes}: copy it again or {_REMEDY}"
        )


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise DataError(
            f"{path} starts with {header[: len(MAGIC)]!r} instead of {MAGIC!r}, so it is no "
            "index of token shards: give shards made by tools/preprocess_data.py or Megatron."
        )
    if len(header) < HEADER.size:
        _check_size(path, HEADER.size, "its header alone would")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(
            f"{path} has format version {version} and only {VERSION} is known: {_REMEDY}"
        )
    if code not in DTYPES:
        told = f"{code} ({_FLOAT_DTYPES[code]})" if code in _FLOAT_DTYPES else str(code)
        known = ", ".join(f"{key} ({dtype.name})" for key, dtype in DTYPES.items())
        raise DataError(f"{path} has dtype code {told} and tokens need one of {known}: {_REMEDY}")
    return DTYPES[code], num_sequences, num_indices


def _read_index(path: Path) -> tuple[np.dtype[Any], int, npt.NDArray[np.int32]]:
    """Returns the dtype, the number of tokens and the length of each document in tokens."""
    dtype, num_sequences, num_indices = _read_header(path)
    expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_indices
    _check_size(path, expected_bytes, f"{num_sequences} sequences, {num_indices} document indices")

    def mapped(kind: str, start_bytes: int, count: int) -> npt.NDArray[Any]:
        if not count:
            return np.empty(0, dtype=kind)
        return np.memmap(path, dtype=kind, mode="r", offset=start_bytes, shape=(count,))

    lengths = mapped("<i4", HEADER.size, num_sequences)
    offsets = mapped("<i8", HEADER.size + 4 * num_sequences, num_sequences)
    indices = mapped("<i8", HEADER.size + 12 * num_sequences, num_indices)
    num_tokens = 0
    for start in range(0, num_sequences, CHUNK_ITEMS):
        chunk = lengths[start : start + CHUNK_ITEMS]
        ends = num_tokens + chunk.cumsum(dtype=np.int64)
        expected_offsets = (ends - chunk) * dtype.itemsize
        wrong = (chunk < 0) | (offsets[start : start + CHUNK_ITEMS] != expected_offsets)
        if wrong.any():
            raise DataError(
                f"{path} is damaged: sequence {start + int(wrong.argmax())} has a length or an "
                f"offset that does not follow from the sequences before it: {_REMEDY}"
            )
        num_tokens = int(ends[-1])
    if not num_indices or indices[0] != 0 or indices[-1] != num_sequences:
        raise DataError(
            f"{path} is damaged: its document indices do not run from 0 to the {num_sequences} "
            f"sequences: {_REMEDY}"
        )
    if num_indices == num_sequences + 1 and (np.diff(indices) == 1).all():
        return dtype, num_tokens, lengths
    if (np.diff(indices) < 0).any():
        raise DataError(f"{path} is damaged: its document indices decrease: {_REMEDY}")
    ends_of_sequences = np.concatenate(([0], lengths.cumsum(dtype=np.int64)))
    document_lengths = np.diff(ends_of_sequences[indices])
    if document_lengths.size and document_lengths.max() > MAX_DOCUMENT_TOKENS:
        raise DataError(
            f"{path}: document {int(document_lengths.argmax())} has "
            f"{int(document_lengths.max())} tokens, over {MAX_DOCUMENT_TOKENS}: split it."
        )
    return dtype, num_tokens, document_lengths.astype(np.int32)
