"""Token stores: a list of extents of files of tokens, and a manifest. What runs and tools read.

Shards, `PREFIX.bin` with `PREFIX.idx`, are one extent; a merge has one for each of its parts, and a
subset one for each document that it takes. All are opened by `open_tokens` and read alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import read_json
from megatron_mdm.data.extents import Extents, extents_path
from megatron_mdm.data.manifest import Manifest, SubsetRecipe, manifest_path
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import TokenShards, are_shards, shard_paths
from megatron_mdm.data.source import (
    PART_BLOCKS,
    IntArray,
    TokenSource,
    check_range,
    fingerprint_stream,
    split_range,
)


class TokenStore(TokenSource):
    """A stream of tokens that lies in shards. Make it with `open_tokens`.

    Args:
        prefix: The path without extension.
        parts: The shards that hold the tokens, open.
        extents: Which stretch of them stands where in the stream.
        view: What PREFIX.json says of a view; None for shards.

    Attributes:
        prefix: The path without extension.
        view: What PREFIX.json says of a view; None for shards.
        dtype: The integer type of a token on disk.
    """

    def __init__(
        self, prefix: Path, parts: Sequence[TokenShards], extents: Extents, view: ViewRecord | None
    ) -> None:
        self.prefix = prefix
        self.view = view
        self.dtype: np.dtype[Any] = parts[0].dtype
        self._parts = tuple(parts)
        self._extents = extents
        counts = [part.num_documents for part in parts]
        self._first_document_P = np.cumsum([0, *counts], dtype=np.int64)
        # Extents of a subset are documents; others are whole parts, whose indexes know documents.
        self._extents_are_documents = view is not None and view.made_by == "subset"
        self._is_one_part = view is None

    @classmethod
    def open(cls, prefix: Path | str) -> TokenStore:
        """Opens shards or a view, in time proportional to its parts.

        Each part is opened, which takes constant time, and where a view refers to it its counts,
        token type and 32 blocks of its tokens are compared with those it had before.

        Args:
            prefix: The path without extension.

        Returns:
            The store.

        Raises:
            DataError: Nothing opens, files of shards and of a view are there, or a part of a view
                is missing or has changed.
        """
        prefix = Path(prefix)
        path = manifest_path(prefix)
        if not is_view(prefix):
            shards = TokenShards.open(prefix)
            return cls(prefix, [shards], Extents.of_whole_parts([shards.num_tokens], path), None)
        others = [other for other in shard_paths(prefix)[1:] if other.exists()]
        if others:
            raise DataError(
                f"{path} is a view and {others[0]} exists beside it, so it is not clear which is "
                "meant: remove one of them."
            )
        view = ViewRecord.read(path)
        parts = [_open_part(path, part, view.dtype) for part in view.parts]
        sizes = [part.num_tokens for part in parts]
        if view.made_by == "merge":
            return cls(prefix, parts, Extents.of_whole_parts(sizes, path), view)
        rows = extents_path(prefix)
        extents = Extents.open(rows, view.num_documents, sizes, view.num_tokens)
        return cls(prefix, parts, extents, view)

    @property
    def num_documents(self) -> int:
        """The documents."""
        return self.parts[0].num_documents if self.view is None else self.view.num_documents

    @property
    def num_tokens(self) -> int:
        """The tokens of all documents, at least 1."""
        return self.parts[0].num_tokens if self.view is None else self.view.num_tokens

    @property
    def manifest(self) -> Manifest | None:
        """How the tokens were made; None for shards without a manifest."""
        return self.parts[0].manifest if self.view is None else self.view.manifest

    @property
    def subset(self) -> SubsetRecipe | None:
        """How the store was cut out of another; None for what is no subset."""
        if self.view is not None:
            return self.view.subset
        return self.manifest.subset if self.manifest is not None else None

    @property
    def parts(self) -> tuple[TokenShards, ...]:
        """The pairs of shards that hold the tokens."""
        return self._parts

    @property
    def files(self) -> list[Path]:
        """The files that the tokens lie in."""
        mine = [] if self.view is None else [manifest_path(self.prefix), extents_path(self.prefix)]
        return mine + [path for part in self.parts for path in part.files]

    @cached_property
    def document_lengths(self) -> IntArray:
        """Tokens of each document, int64 [num_documents]; found on first use.

        Raises:
            DataError: The extents or a part's index are damaged.
        """
        chunks = [
            self.locate_documents(np.arange(start, stop))[:, 2]
            for start, stop in split_range(self.num_documents)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *chunks])

    def read(self, start: int, stop: int) -> IntArray:
        """See `TokenSource.read`."""
        return self.read_stored(start, stop).astype(np.int64, copy=False)

    def read_stored(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """See `TokenSource.read_stored`."""
        if self._is_one_part:
            return self._parts[0].read_stored(start, stop)
        check_range(self, start, stop)
        pieces = self._extents.locate(start, stop) if stop > start else []
        blocks = [self._parts[part].read_stored(first, last) for part, first, last in pieces]
        return blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, self.dtype), *blocks])

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """See `TokenSource.locate_documents`."""
        if self._extents_are_documents:
            return self._extents.select(document_N)
        part_N = np.searchsorted(self._first_document_P, document_N, side="right") - 1
        located_N3 = np.empty((len(document_N), 3), dtype=np.int64)
        located_N3[:, 0] = part_N
        for part in np.unique(part_N).tolist():
            mine_N = part_N == part
            inside_N = document_N[mine_N] - self._first_document_P[part]
            located_N3[mine_N, 1:] = self.parts[part].index.locate_documents(inside_N)
        return located_N3

    def find_documents(self, token_N: IntArray) -> IntArray:
        """See `TokenSource.find_documents`; documents are numbered through all parts."""
        part_N, place_N = self._extents.place_tokens(token_N).T
        document_N: IntArray = self._first_document_P[part_N]
        for part in np.unique(part_N).tolist():
            mine_N = part_N == part
            document_N[mine_N] += self.parts[part].index.find_documents(place_N[mine_N])
        return document_N

    def locate_extents(self) -> IntArray:
        """See `TokenSource.locate_extents`."""
        return self._extents.select(np.arange(len(self._extents)))

    def verify(self) -> None:
        """Checks all extents and the index of every part, in flat memory.

        Raises:
            DataError: The store or a part is damaged.
        """
        for part in self.parts:
            part.index.verify()
        if self.view is not None and self.view.extents_sha256 is not None:
            self._extents.verify(self.view.extents_sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.prefix,)


def open_tokens(prefix: Path | str) -> TokenStore:
    """Opens what lies at a path: token shards, or a view over some.

    Args:
        prefix: The path without extension.

    Returns:
        The store.

    Raises:
        DataError: Neither opens, or files of both are there.
    """
    return TokenStore.open(prefix)


def is_view(prefix: Path) -> bool:
    """Tells whether a view lies at a path.

    Args:
        prefix: The path without extension.

    Returns:
        Whether PREFIX.json exists and says that it is a view.

    Raises:
        DataError: PREFIX.json cannot be read or is not JSON.
    """
    path = manifest_path(prefix)
    if not path.exists():
        return False
    fields = read_json(path, "write it again with the tool that made it and --overwrite.")
    return isinstance(fields, dict) and fields.get("kind") == "view"


def _open_part(path: Path, part: ViewPart, dtype: str) -> TokenShards:
    # Where the view is a symbolic link, paths start at the file that the link leads to.
    prefix = path.resolve().parent / part.path
    remedy = "put back what was there, or make the view again with the tool that made it."
    if not are_shards(prefix):
        raise DataError(f"{path} refers to the shards {prefix}, which do not exist: {remedy}")
    shards = TokenShards.open(prefix)
    told = (part.num_documents, part.num_tokens, dtype)
    found = (shards.num_documents, shards.num_tokens, shards.dtype.name)
    if told != found:
        raise DataError(
            f"{path} refers to {told[0]} documents, {told[1]} tokens of {told[2]} in {prefix}, "
            f"which now has {found[0]}, {found[1]} of {found[2]}: {remedy}"
        )
    if fingerprint_stream(shards, PART_BLOCKS) != part.fingerprint:
        raise DataError(
            f"{path} refers to the shards {prefix}, whose tokens have changed since: {remedy}"
        )
    return shards
