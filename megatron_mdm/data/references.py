"""What refers to tokens in other files: views over shards, and references to foreign files.

A view is PREFIX.json with `"kind": "view"`, and for a subset PREFIX.extents.npy. A PREFIX.bin.json
stands for PREFIX.bin: a corpus that is tokens already, in a type that shards can hold, is indexed
where it is.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.manifest import Manifest, Record, SubsetRecipe
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.source import PART_BLOCKS, TokenSource, fingerprint_stream, spread_blocks

_MAX_COUNT = np.iinfo(np.int64).max
_NUM_BLOCKS = 32
_BLOCK_BYTES = 1024


def reference_path(prefix: Path) -> Path:
    """Names the file that stands for the tokens of a pair of shards: PREFIX.bin.json."""
    return Path(f"{prefix}.bin.json")


class Reference(Record):
    """Where the tokens of shards lie.

    Attributes:
        kind: Tells it from other JSON files.
        format_version: The version of this format.
        path: The file of tokens, relative to the folder of the reference.
        size_bytes: The size of that file.
        offset_bytes: Where the tokens start in it.
        num_bytes: The bytes of the tokens.
        fingerprint: The SHA-256 in hexadecimal of 32 blocks spread over the tokens.
    """

    what = "a reference to tokens"
    remedy = "put back what was there, or run mdm prepare again with --overwrite."

    kind: Literal["reference"] = "reference"
    format_version: Literal[1] = 1
    path: str = Field(min_length=1)
    size_bytes: int = Field(ge=0)
    offset_bytes: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    fingerprint: str

    @classmethod
    def of(cls, file: Path, folder: Path, *, offset_bytes: int, num_bytes: int) -> Reference:
        """Refers to a part of a file.

        Args:
            file: The file of tokens.
            folder: The folder that the reference will lie in.
            offset_bytes: Where the tokens start.
            num_bytes: The bytes of the tokens.

        Returns:
            The reference.

        Raises:
            DataError: The file cannot be read, or is shorter.
        """
        opened = PositionalFile(file)
        return cls(
            path=_make_relative(file, folder),
            size_bytes=opened.size_bytes,
            offset_bytes=offset_bytes,
            num_bytes=num_bytes,
            fingerprint=_fingerprint(opened, offset_bytes, num_bytes),
        )

    def open_file(self, path: Path) -> PositionalFile:
        """Opens the file of tokens, which has to be as it was.

        Args:
            path: The file that this reference was read from.

        Returns:
            The file.

        Raises:
            DataError: It is missing or has changed.
        """
        # From a symbolic link, the path starts at the file that the link leads to.
        file = path.resolve().parent / self.path
        if not file.is_file():
            raise DataError(f"{path} refers to {file}, which does not exist: {self.remedy}")
        opened = PositionalFile(file)
        same = opened.size_bytes == self.size_bytes
        if not same or _fingerprint(opened, self.offset_bytes, self.num_bytes) != self.fingerprint:
            raise DataError(f"{path} refers to {file}, which has changed since: {self.remedy}")
        return opened


class ViewPart(Record):
    """One pair of shards that a view refers to.

    Attributes:
        path: Its path without extension, relative to the folder of the view.
        num_documents: The documents that it held when the view was made.
        num_tokens: The tokens that it held then.
        fingerprint: Its `fingerprint_stream` of 32 blocks then.
    """

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
        return cls(
            path=_make_relative(shards.prefix, folder),
            num_documents=shards.num_documents,
            num_tokens=shards.num_tokens,
            fingerprint=fingerprint_stream(shards, PART_BLOCKS),
        )


class ViewRecord(Record):
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

    what = "a view"
    remedy = "make it again with mdm subset or mdm merge."

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
    def _check_itself(self) -> ViewRecord:
        if (self.made_by == "subset") != (self.extents_sha256 is not None):
            raise ValueError("is not a view: a subset has extents_sha256 and a merge has none")
        mine = (self.num_documents, self.num_tokens, self.dtype)
        wholes = []
        if self.manifest is not None:
            manifest = self.manifest
            wholes.append((manifest.num_documents, manifest.num_tokens, manifest.dtype))
        if self.made_by == "merge":
            num_documents = sum(part.num_documents for part in self.parts)
            wholes.append((num_documents, sum(part.num_tokens for part in self.parts), self.dtype))
        for other in wholes:
            if other != mine:
                raise ValueError(
                    f"tells of {mine[0]} documents, {mine[1]} tokens of {mine[2]}, and its "
                    f"parts or its manifest of {other[0]}, {other[1]} of {other[2]}"
                )
        return self


def _make_relative(path: Path, folder: Path) -> str:
    # Symbolic links are resolved first, because ".." goes up from where a link points.
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def _fingerprint(file: PositionalFile, offset_bytes: int, num_bytes: int) -> str:
    digest = hashlib.sha256(str(num_bytes).encode())
    length = min(_BLOCK_BYTES, num_bytes)
    for start in spread_blocks(num_bytes, length, _NUM_BLOCKS):
        digest.update(file.read("u1", offset_bytes + start, length).tobytes())
    return digest.hexdigest()
