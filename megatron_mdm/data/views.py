"""Views: token streams put together from other shards by reference, and what opens either.

On disk a view is PREFIX.json, with `"kind": "view"`, and for a subset PREFIX.extents.npy. It is
read like shards. Its parts are always real shards, so that reading never goes through another view.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import whole_file
from megatron_mdm.data.extents import Extents, extents_path
from megatron_mdm.data.manifest import Manifest, SubsetRecipe, manifest_path, read_json
from megatron_mdm.data.shards import MAX_DOCUMENT_TOKENS, TokenShards, are_shards, shard_paths
from megatron_mdm.data.stream import (
    IntArray,
    StreamMethods,
    TokenSource,
    check_range,
    stream_fingerprint,
)

__all__ = ["TokenSource", "TokenView", "ViewPart", "ViewRecord", "open_tokens"]

# A view of thousands of parts has to open quickly on a slow file system.
_PART_BLOCKS = 32
_MAX_COUNT = np.iinfo(np.int64).max


class ViewPart(BaseModel):
    """One pair of shards that a view refers to.

    Attributes:
        path: Its path without extension, relative to the folder of the view.
        num_documents: The documents that it held when the view was made.
        num_tokens: The tokens that it held then.
        fingerprint: Its `stream_fingerprint` of 32 blocks then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    num_documents: int = Field(ge=0)
    num_tokens: int = Field(ge=1)
    fingerprint: str

    @classmethod
    def of(cls, shards: TokenSource, folder: Path) -> ViewPart:
        """Describes shards for a view.

        Args:
            shards: The shards.
            folder: The folder that the view lies in.

        Returns:
            The part.
        """
        # Without symbolic links, since ".." leads from where a link points.
        real = shards.prefix.parent.resolve() / shards.prefix.name
        return cls(
            path=os.path.relpath(real, folder.resolve()),
            num_documents=shards.num_documents,
            num_tokens=shards.num_tokens,
            fingerprint=stream_fingerprint(shards, _PART_BLOCKS),
        )


class ViewRecord(BaseModel):
    """The content of a view's JSON file.

    Attributes:
        kind: Tells it from the manifest of plain shards.
        format_version: The version of this format.
        made_by: "merge": all documents of the parts in order; "subset": the documents that the
            extents name.
        num_documents: The documents of the view; of a subset, the extents too.
        num_tokens: The tokens of the view.
        dtype: The numpy name of the integer type of a token in all parts.
        parts: The shards that it refers to, none of them empty.
        extents_sha256: What `ExtentsWriter.sha256` gave; None for a merge, which has no extents.
        subset: How a subset was cut out of its parent.
        manifest: How the tokens were made; None if the parts have no manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["view"] = "view"
    format_version: Literal[1] = 1
    made_by: Literal["merge", "subset"]
    num_documents: int = Field(ge=1, le=_MAX_COUNT)
    num_tokens: int = Field(ge=1, le=_MAX_COUNT)
    dtype: str
    parts: list[ViewPart] = Field(min_length=1)
    extents_sha256: str | None = None
    subset: SubsetRecipe | None = None
    manifest: Manifest | None = None

    @model_validator(mode="after")
    def _has_extents_for_subset(self) -> ViewRecord:
        if (self.made_by == "subset") != (self.extents_sha256 is not None):
            raise ValueError("a subset has extents_sha256 and a merge has none")
        return self

    @classmethod
    def read(cls, path: Path) -> ViewRecord:
        """Reads and checks a view's JSON file.

        Args:
            path: The file.

        Returns:
            The record.

        Raises:
            DataError: The file cannot be read, is not JSON, or has a wrong or contradicting field.
        """
        remedy = "make it again with tools/subset_data.py or tools/merge_data.py."
        try:
            record = cls.model_validate(read_json(path, remedy))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise DataError(f"{path} is not a view: {name}: {first['msg']}: {remedy}") from error
        mine = (record.num_documents, record.num_tokens, record.dtype)
        wholes = [mine]
        if record.manifest is not None:
            manifest = record.manifest
            wholes.append((manifest.num_documents, manifest.num_tokens, manifest.dtype))
        if record.made_by == "merge":
            num_documents = sum(part.num_documents for part in record.parts)
            num_tokens = sum(part.num_tokens for part in record.parts)
            wholes.append((num_documents, num_tokens, record.dtype))
        for other in wholes:
            if other != mine:
                raise DataError(
                    f"{path} tells of {mine[0]} documents, {mine[1]} tokens of {mine[2]}, and its "
                    f"parts or its manifest of {other[0]}, {other[1]} of {other[2]}: {remedy}"
                )
        return record

    def write(self, path: Path) -> None:
        """Writes the record as JSON, whole or not at all.

        Args:
            path: The file to create or replace.
        """
        with whole_file(path) as out:
            out.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")


@dataclass(frozen=True, eq=False)
class TokenView(StreamMethods):
    """A stream of tokens that lies in other shards. Make it with `TokenView.open`.

    Any number of threads may read at once. Pickled, it is its path.

    Attributes:
        prefix: The path of the view without extension.
        record: What its JSON file says.
        parts: The shards that hold the tokens, open.
    """

    prefix: Path
    record: ViewRecord
    parts: tuple[TokenShards, ...]
    _extents: Extents = field(repr=False)

    @classmethod
    def open(cls, prefix: Path | str) -> TokenView:
        """Opens a view, in time proportional to its parts.

        Each part is opened, which takes constant time, and its counts, token type and 32 blocks of
        its tokens are compared with those it had when the view was made.

        Args:
            prefix: The path of the view without extension.

        Returns:
            The view.

        Raises:
            DataError: The view is damaged, or a part is missing, damaged or has changed.
        """
        prefix = Path(prefix)
        path = manifest_path(prefix)
        record = ViewRecord.read(path)
        parts = tuple(_open_part(path, part, record.dtype) for part in record.parts)
        part_tokens = [part.num_tokens for part in parts]
        if record.made_by == "merge":
            extents = Extents.of_whole_parts(part_tokens, path)
        else:
            extents = Extents.open(
                extents_path(prefix), record.num_documents, part_tokens, record.num_tokens
            )
        return cls(prefix, record, parts, extents)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type of a token in the parts."""
        return self.parts[0].dtype

    @property
    def num_documents(self) -> int:
        """The documents."""
        return self.record.num_documents

    @property
    def num_tokens(self) -> int:
        """The tokens of all documents, at least 1."""
        return self.record.num_tokens

    @property
    def manifest(self) -> Manifest | None:
        """How the tokens were made; None if the parts have no manifest."""
        return self.record.manifest

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [num_documents]; computed on first use.

        Raises:
            DataError: The extents or a part's index are damaged.
        """
        lengths = np.empty(self.num_documents, dtype=np.int32)
        done = 0
        chunks = (
            (part.document_lengths for part in self.parts)
            if self.record.made_by == "merge"
            else self._extents.lengths()
        )
        for chunk in chunks:
            if chunk.size and chunk.max() > MAX_DOCUMENT_TOKENS:
                raise DataError(
                    f"{extents_path(self.prefix)} is damaged: a document has {chunk.max()} tokens, "
                    f"over {MAX_DOCUMENT_TOKENS}: make it again with tools/subset_data.py."
                )
            lengths[done : done + len(chunk)] = chunk
            done += len(chunk)
        return lengths

    def read_into(self, start: int, out: IntArray) -> None:
        """Gathers a part of the stream into an array.

        Args:
            start: The first token, 0 or more.
            out: int64, shape [length]; filled with the token ids.

        Raises:
            IndexError: The part reaches outside the stream.
            DataError: A file is damaged or has become shorter, or the storage fails.
        """
        check_range(self, start, out.size)
        if not out.size:
            return
        done = 0
        for part, offset, length in self._extents.locate(start, out.size):
            self.parts[part].read_into(offset, out[done : done + length])
            done += length

    def locate_documents(self, document_N: IntArray) -> IntArray:
        """Finds documents in the parts.

        Args:
            document_N: int64 [N], each in 0..num_documents-1.

        Returns:
            int64 [N, 3]: number in `parts`, first token there, tokens.

        Raises:
            DataError: The extents or a part's index are damaged at one of them.
        """
        if self.record.made_by == "subset":
            return self._extents.locate_extents(document_N)
        ends = np.cumsum([part.num_documents for part in self.parts])
        part_N = np.searchsorted(ends, document_N, side="right")
        located_N3 = np.empty((len(document_N), 3), dtype=np.int64)
        for number in np.unique(part_N).tolist():
            mine = part_N == number
            first = int(ends[number]) - self.parts[number].num_documents
            located_N3[mine] = self.parts[number].locate_documents(document_N[mine] - first)
            located_N3[mine, 0] = number
        return located_N3

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds the documents that hold tokens.

        Args:
            token_N: int64 [N], each in 0..num_tokens-1.

        Returns:
            int64 [N, 2]: number in `parts`, document there.

        Raises:
            DataError: The extents are damaged at one of them.
        """
        placed = [self._extents.locate(token, 1)[0][:2] for token in token_N.tolist()]
        found_N2 = np.array(placed, dtype=np.int64).reshape(-1, 2)
        for part in np.unique(found_N2[:, 0]).tolist():
            mine = found_N2[:, 0] == part
            found_N2[mine, 1] = self.parts[part].find_documents(found_N2[mine, 1])[:, 1]
        return found_N2

    def locate_extents(self) -> IntArray:
        """Finds the stretches of the stream.

        Returns:
            int64 [N, 3]: number in `parts`, first token there, tokens.

        Raises:
            DataError: The extents are damaged.
        """
        return self._extents.locate_all()

    def verify(self) -> None:
        """Checks all extents and the index of every part, in flat memory.

        Raises:
            DataError: The view or a part is damaged.
        """
        for part in self.parts:
            part.verify()
        if self.record.extents_sha256 is not None:
            self._extents.verify(self.record.extents_sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenView.open, (self.prefix,)


def open_tokens(prefix: Path | str) -> TokenShards | TokenView:
    """Opens what lies at a path: token shards, or a view over some.

    Args:
        prefix: The path without extension.

    Returns:
        The shards, or the view if PREFIX.json says that it is one.

    Raises:
        DataError: Neither opens, or files of both are there.
    """
    prefix = Path(prefix)
    if not is_view(prefix):
        return TokenShards.open(prefix)
    shards = [path for path in shard_paths(prefix)[1:] if path.exists()]
    if shards:
        raise DataError(
            f"{manifest_path(prefix)} is a view and {shards[0]} exists beside it, so it is not "
            "clear which is meant: remove one of them."
        )
    return TokenView.open(prefix)


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
    # Of a link, the parts lie beside the file that it leads to.
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
    if stream_fingerprint(shards, _PART_BLOCKS) != part.fingerprint:
        raise DataError(
            f"{path} refers to the shards {prefix}, whose tokens have changed since: {remedy}"
        )
    return shards
