"""Token shards: the `.bin` and `.idx` pair that Megatron-Core's datasets read and write.

`.bin` is every token of every sequence in a row. `.idx` is, little-endian: a magic of 9 bytes,
version (uint64), dtype code (uint8), the number of sequences and the number of document indices
(uint64 each); then each sequence's length (int32), each sequence's byte offset (int64), and the
document indices (int64): a 0, then for each document the number of sequences up to its end.
In place of a `.bin` a reference may say in which other file the tokens lie (`data/reference.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import read_path
from megatron_mdm.data.index import (
    DTYPES,
    HEADER,
    MAGIC,
    MAX_DOCUMENT_TOKENS,
    REMEDY,
    VERSION,
    ShardIndex,
    check_size,
)
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.reference import Reference, reference_path
from megatron_mdm.data.stream import (
    CHUNK_ITEMS,
    IntArray,
    PositionalFile,
    StreamMethods,
    check_range,
)

__all__ = [
    "CHUNK_ITEMS",
    "DTYPES",
    "HEADER",
    "MAGIC",
    "MAX_DOCUMENT_TOKENS",
    "VERSION",
    "TokenShards",
    "are_shards",
    "bin_path",
    "idx_path",
    "read_output_prefix",
    "shard_paths",
    "token_dtype",
]


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


def shard_paths(prefix: Path) -> tuple[Path, ...]:
    """Names the files that shards may consist of, the manifest first.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        Manifest, index, tokens, and the reference that may stand for these.
    """
    return manifest_path(prefix), idx_path(prefix), bin_path(prefix), reference_path(prefix)


def read_output_prefix(text: str) -> Path:
    """Reads the path of shards that are to be written, as a user types it.

    Args:
        text: The path.

    Returns:
        The path without `.bin` and `.idx`.

    Raises:
        DataError: It is a folder's or a file's, or cannot be a name here.
    """
    path = read_path(text)
    for ending in (".bin", ".idx", ".json"):
        if path.name.endswith(ending):
            raise DataError(
                f"{text} ends with {ending}, and such endings are added: give "
                f"{text.removesuffix(ending)}."
            )
    if text.endswith(os.sep) or path.name in ("", ".."):
        raise DataError(
            f"{text or repr(text)} names a folder, and shards need a name in it: give such as "
            f"{path / 'train'}."
        )
    return path


def are_shards(prefix: Path) -> bool:
    """Tells whether an index and tokens, or a reference to some, lie at a path.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        Whether they exist.
    """
    has_tokens = bin_path(prefix).is_file() or reference_path(prefix).is_file()
    return has_tokens and idx_path(prefix).is_file()


@dataclass(frozen=True, eq=False)
class TokenShards(StreamMethods):
    """A pair of shards that is open for reading. Make it with `TokenShards.open`.

    Any number of threads may read at once. Pickled, it is its path.

    Attributes:
        prefix: The path of the shards without `.bin` and `.idx`.
        dtype: The integer type of a token.
        num_documents: The documents.
        num_tokens: The tokens of all documents, at least 1 unless empty shards were asked for.
        manifest: What `tools/preprocess_data.py` wrote beside them; None for shards of others.
        tokens_path: The file that holds the tokens: `.bin`, or where a reference leads.
        tokens_offset_bytes: Where they start in it.
    """

    prefix: Path
    dtype: np.dtype[Any]
    num_documents: int
    num_tokens: int
    manifest: Manifest | None
    tokens_path: Path
    tokens_offset_bytes: int
    _index: ShardIndex = field(repr=False)
    _bin: PositionalFile = field(repr=False)
    _allow_empty: bool = field(repr=False)

    @classmethod
    def open(cls, prefix: Path | str, allow_empty: bool = False) -> TokenShards:
        """Opens a pair of shards in constant time and memory.

        Checks the index's header, both files' sizes, the first and the last document, the manifest
        and some spots spread over the index; `verify` checks all of it.

        Args:
            prefix: The path of the shards without `.bin` and `.idx`.
            allow_empty: Whether shards without tokens open, as a part of an array job may be.

        Returns:
            The shards.

        Raises:
            DataError: A file is missing, truncated, too long or of another format, the files
                contradict each other or their manifest, or there are no tokens.
        """
        prefix = Path(prefix)
        if not are_shards(prefix):
            path = idx_path(prefix) if not idx_path(prefix).is_file() else bin_path(prefix)
            raise DataError(
                f"{path} does not exist: give the path of the shards without .bin or .idx, "
                "or make them with tools/preprocess_data.py."
            )
        index = ShardIndex(idx_path(prefix))
        tokens, offset_bytes, num_bytes = _open_tokens_file(prefix)
        check_size(
            tokens.path,
            num_bytes,
            index.num_tokens * index.dtype.itemsize,
            f"{index.num_tokens} tokens of {index.dtype}",
        )
        if not index.num_tokens and not allow_empty:
            raise DataError(f"{bin_path(prefix)} holds no tokens: {REMEDY}")
        return cls(
            prefix=prefix,
            dtype=index.dtype,
            num_documents=index.num_documents,
            num_tokens=index.num_tokens,
            manifest=_read_manifest(prefix, index),
            tokens_path=tokens.path,
            tokens_offset_bytes=offset_bytes,
            _index=index,
            _bin=tokens,
            _allow_empty=allow_empty,
        )

    @property
    def parts(self) -> tuple[TokenShards, ...]:
        """The pairs of shards that hold the tokens: this one."""
        return (self,)

    @property
    def document_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [num_documents]; mapped or computed on first use."""
        return self._index.document_lengths

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The whole stream mapped into memory, [num_tokens], for inspection.

        Reading it ends the process by a signal if the file gets shorter meanwhile; runs use `read`.
        """
        return self._bin.map(self.dtype, self.tokens_offset_bytes, self.num_tokens)

    def read_into(self, start: int, out: IntArray) -> None:
        """Copies a part of the stream into an array.

        Args:
            start: The first token, 0 or more.
            out: int64, shape [length]; filled with the token ids.

        Raises:
            IndexError: The part reaches outside the stream.
            DataError: The file has become shorter, or the storage fails.
        """
        check_range(self, start, out.size)
        offset_bytes = self.tokens_offset_bytes + start * self.dtype.itemsize
        out[:] = self._bin.read(self.dtype, offset_bytes, out.size)

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """Finds documents in the stream.

        Args:
            document_N: int64 [N], each in 0..num_documents-1.

        Returns:
            int64 [N, 3]: number in `parts` (0), first token there, tokens.

        Raises:
            DataError: The index is damaged at one of them.
        """
        located_N2 = self._index.locate_documents(document_N)
        return np.concatenate([np.zeros_like(located_N2[:, :1]), located_N2], axis=1)

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds the documents that hold tokens.

        Args:
            token_N: int64 [N], each in 0..num_tokens-1.

        Returns:
            int64 [N, 2]: number in `parts` (0), document there.
        """
        return np.stack([np.zeros_like(token_N), self._index.find_documents(token_N)], axis=1)

    def locate_extents(self) -> IntArray:
        """Finds the stretches of the stream.

        Returns:
            int64 [1, 3]: number in `parts` (0), first token there (0), tokens.
        """
        return np.array([[0, 0, self.num_tokens]], dtype=np.int64)

    def verify(self) -> None:
        """Checks all of the index, in time proportional to the documents and flat memory.

        Raises:
            DataError: A length, an offset or a document index is wrong.
        """
        self._index.verify()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards.open, (self.prefix, self._allow_empty)


def _open_tokens_file(prefix: Path) -> tuple[PositionalFile, int, int]:
    """Opens the file of tokens; returns it, where they start in it, and their bytes."""
    path = reference_path(prefix)
    if not path.is_file():
        tokens = PositionalFile(bin_path(prefix))
        return tokens, 0, tokens.size_bytes
    if bin_path(prefix).exists():
        raise DataError(
            f"{path} says where the tokens lie and {bin_path(prefix)} exists beside it, so it is "
            "not clear which is meant: remove one of them."
        )
    reference = Reference.read(path)
    return reference.open_file(path), reference.offset_bytes, reference.num_bytes


def _read_manifest(prefix: Path, index: ShardIndex) -> Manifest | None:
    path = manifest_path(prefix)
    if not path.exists():
        return None
    manifest = Manifest.read(path)
    told = (manifest.num_documents, manifest.num_tokens, manifest.dtype)
    found = (index.num_documents, index.num_tokens, index.dtype.name)
    if told != found:
        raise DataError(
            f"{path} describes {told[0]} documents, {told[1]} tokens of {told[2]}, and the shards "
            f"hold {found[0]}, {found[1]} of {found[2]}: {REMEDY}"
        )
    return manifest
