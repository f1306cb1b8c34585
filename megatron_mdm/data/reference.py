"""References: a `PREFIX.bin.json` stands for `PREFIX.bin` and says in which file its bytes lie.

A corpus that is tokens already, in a type that shards can hold, is indexed where it is.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import whole_file
from megatron_mdm.data.manifest import read_json
from megatron_mdm.data.stream import PositionalFile

_NUM_BLOCKS = 32
_BLOCK_BYTES = 1024
_REMEDY = "put back what was there, or run tools/preprocess_data.py again with --overwrite."


def reference_path(prefix: Path) -> Path:
    """Names the file that stands for the tokens of a pair of shards.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        The prefix with `.bin.json` after it.
    """
    return Path(f"{prefix}.bin.json")


class Reference(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        # Without symbolic links, since ".." leads from where a link points.
        real = file.parent.resolve() / file.name
        return cls(
            path=os.path.relpath(real, folder.resolve()),
            size_bytes=opened.size_bytes,
            offset_bytes=offset_bytes,
            num_bytes=num_bytes,
            fingerprint=_fingerprint(opened, offset_bytes, num_bytes),
        )

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Reads and checks a reference.

        Args:
            path: Its file.

        Returns:
            The reference.

        Raises:
            DataError: The file cannot be read, is not JSON, or has a wrong field.
        """
        try:
            return cls.model_validate(read_json(path, _REMEDY))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise DataError(
                f"{path} is not a reference to tokens: {field}: {first['msg']}: {_REMEDY}"
            ) from error

    def write(self, path: Path) -> None:
        """Writes the reference as JSON, whole or not at all.

        Args:
            path: The file to create or replace.
        """
        with whole_file(path) as stream:
            stream.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")

    def open_file(self, path: Path) -> PositionalFile:
        """Opens the file of tokens, which has to be as it was.

        Args:
            path: The file that this reference was read from.

        Returns:
            The file.

        Raises:
            DataError: It is missing or has changed.
        """
        # Of a link, beside the file that it leads to.
        file = path.resolve().parent / self.path
        if not file.is_file():
            raise DataError(f"{path} refers to {file}, which does not exist: {_REMEDY}")
        opened = PositionalFile(file)
        same = opened.size_bytes == self.size_bytes
        if not same or _fingerprint(opened, self.offset_bytes, self.num_bytes) != self.fingerprint:
            raise DataError(f"{path} refers to {file}, which has changed since: {_REMEDY}")
        return opened


def _fingerprint(file: PositionalFile, offset_bytes: int, num_bytes: int) -> str:
    digest = hashlib.sha256(str(num_bytes).encode())
    length = min(_BLOCK_BYTES, num_bytes)
    last = num_bytes - length
    starts = sorted({block * last // (_NUM_BLOCKS - 1) for block in range(_NUM_BLOCKS)})
    if len(starts) * length >= num_bytes:
        # The blocks of a short stream overlap: it is read once instead of many times over.
        whole = file.read("u1", offset_bytes, num_bytes)
        blocks = (whole[start : start + length] for start in starts)
    else:
        blocks = (file.read("u1", offset_bytes + start, length) for start in starts)
    for block in blocks:
        digest.update(block.tobytes())
    return digest.hexdigest()
