"""Token shards: the `.bin` and `.idx` pair that Megatron-Core's datasets read and write.

`.bin` is every token of every sequence in a row. `.idx` is, little-endian: a magic of 9 bytes,
version (uint64), dtype code (uint8), the number of sequences and the number of document indices
(uint64 each); then each sequence's length (int32), each sequence's byte offset (int64), and the
document indices (int64): a 0, then for each document the number of sequences up to its end.
In place of a `.bin` a reference may say in which other file the tokens lie (`data/references.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import read_path
from megatron_mdm.data.index import REMEDY, ShardIndex, check_size
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.references import Reference, reference_path
from megatron_mdm.data.source import IntArray, TokenSource, check_range


def choose_token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Chooses the smallest token type by Megatron-Core's rule, so that both make equal files.

    Args:
        vocab_size: The number of token ids, at least 1.

    Returns:
        uint16 below 65,500 ids (Megatron's bound, a little under what fits), otherwise int32.
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """Names the file of tokens of a pair of shards: PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Names the index of a pair of shards: PREFIX.idx."""
    return Path(f"{prefix}.idx")


def prompts_path(prefix: Path) -> Path:
    """Names the file of prompt lengths that lies beside shards of prompts and responses."""
    return Path(f"{prefix}.prompts")


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


def exist_whole(prefixes: Sequence[Path], remedy: str, *, are_referred_to: bool = False) -> bool:
    """Tells whether shards with a manifest lie at paths.

    Args:
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        remedy: What to do about files that stand alone, for the message.
        are_referred_to: Whether references stand in place of the tokens.

    Returns:
        Whether they exist; False where no file of them does.

    Raises:
        DataError: Some of the files exist and others do not.
    """
    tokens_path = reference_path if are_referred_to else bin_path
    expected = {
        name(prefix) for prefix in prefixes for name in (tokens_path, idx_path, manifest_path)
    }
    existing = [path for prefix in prefixes for path in shard_paths(prefix) if path.exists()]
    if existing and set(existing) != expected:
        raise DataError(f"{existing[0]} exists without the files that belong to it: {remedy}")
    return bool(existing)


class TokenShards(TokenSource):
    """A pair of shards that is open for reading: one extent. Make it with `TokenShards.open`.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.
        index: Where its documents begin and end.
        file: The file that holds the tokens: `.bin`, or where a reference leads.
        offset_bytes: Where they start in it.
        manifest: What `mdm prepare` wrote beside them; None for shards of others.

    Attributes:
        prefix: The path of the shards without `.bin` and `.idx`.
        index: Where its documents begin and end.
        dtype: The integer type of a token.
        tokens_path: The file that holds the tokens.
    """

    def __init__(
        self,
        prefix: Path,
        index: ShardIndex,
        file: PositionalFile,
        offset_bytes: int,
        manifest: Manifest | None,
    ) -> None:
        self.prefix = prefix
        self.index = index
        self.dtype = index.dtype
        self.tokens_path = file.path
        self._num_tokens = index.num_tokens
        self._file = file
        self._offset_bytes = offset_bytes
        self._manifest = manifest

    @classmethod
    def open(cls, prefix: Path | str, allow_empty: bool = False) -> TokenShards:
        """Opens a pair of shards in constant time and memory.

        Checks the index's header, both files' sizes, the first and the last document, the manifest
        and some spots spread over the index; `index.verify` checks all of it.

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
                "or make them with mdm prepare."
            )
        index = ShardIndex(idx_path(prefix))
        file, offset_bytes, num_bytes = _open_tokens_file(prefix)
        check_size(
            file.path,
            num_bytes,
            index.num_tokens * index.dtype.itemsize,
            f"{index.num_tokens} tokens of {index.dtype}",
        )
        if not index.num_tokens and not allow_empty:
            raise DataError(f"{bin_path(prefix)} holds no tokens: {REMEDY}")
        return cls(prefix, index, file, offset_bytes, _read_manifest(prefix, index))

    @property
    def num_documents(self) -> int:
        """The documents."""
        return self.index.num_documents

    @property
    def num_tokens(self) -> int:
        """The tokens of all documents, at least 1 unless empty shards were asked for."""
        return self._num_tokens

    @property
    def manifest(self) -> Manifest | None:
        """What `mdm prepare` wrote beside them; None for shards of others."""
        return self._manifest

    @property
    def files(self) -> list[Path]:
        """The files that they may consist of, and the one that a reference leads to."""
        return [*shard_paths(self.prefix), prompts_path(self.prefix), self.tokens_path]

    def read(self, start: int, stop: int) -> IntArray:
        """See `TokenSource.read`."""
        return self.read_stored(start, stop).astype(np.int64, copy=False)

    def read_stored(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Reads a part of the stream as it is stored, in the type `dtype`.

        Args:
            start: The first token, 0 or more.
            stop: The token after the last one.

        Returns:
            A new array, [stop - start].

        Raises:
            IndexError: The part reaches outside the stream.
            DataError: The file has become shorter, or the storage fails.
        """
        check_range(self, start, stop)
        return self._file.read(self.dtype, self.place_bytes(start), stop - start)

    def place_bytes(self, token: int) -> int:
        """Where a token begins in the file at `tokens_path`, in bytes."""
        return self._offset_bytes + token * self.dtype.itemsize


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
