"""The manifest that lies beside a pair of token shards and says where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_mdm.errors import DataError
from megatron_mdm.files import whole_file

_HASH_CHUNK_BYTES = 1 << 20


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turns the system's errors in a block that writes, a full disk above all, into a DataError.

    Args:
        path: What is written, for the message.

    Yields:
        Nothing.

    Raises:
        DataError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} could not be written ({error.strerror or error}) and nothing half written "
            "was kept: free space, check permissions, or choose another place."
        ) from error


def manifest_path(prefix: Path) -> Path:
    """Names the manifest of a pair of shards.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        The path of the manifest: the prefix with `.json` after it.
    """
    return Path(f"{prefix}.json")


class SourceFile(BaseModel):
    """One file that was read to make the shards.

    Attributes:
        path: The path as it was given.
        size_bytes: The size of the file.
        sha256: The hash of the content in hexadecimal, or None where it was not computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Describes a file on disk. Reads all of it.

        Args:
            path: The file.

        Returns:
            Its path, size and hash.

        Raises:
            DataError: The file cannot be read.
        """
        digest = hashlib.sha256()
        size_bytes = 0
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
                    size_bytes += len(chunk)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): check the path and its permissions."
            ) from error
        return cls(path=str(path), size_bytes=size_bytes, sha256=digest.hexdigest())

    def has_content_of(self, other: SourceFile) -> bool:
        """Tells whether two files hold the same documents, wherever their folders are.

        Args:
            other: The other file.

        Returns:
            True when name, size and hash agree and the hash is known.
        """
        mine = (Path(self.path).name, self.size_bytes, self.sha256)
        return self.sha256 is not None and mine == (
            Path(other.path).name,
            other.size_bytes,
            other.sha256,
        )


class Manifest(BaseModel):
    """What a pair of token shards holds and how it was made.

    Attributes:
        format_version: The version of this format.
        tokenizer: The tokenizer's name or path as it was given.
        tokenizer_sha256: The hash of the tokenizer's canonical serialisation.
        vocab_size: The tokenizer's largest token id plus one.
        eod_token_id: The id that ends a document.
        special_tokens: The tokenizer's special tokens and their ids.
        num_documents: The documents in the shards.
        num_tokens: The tokens in the shards, ends of documents included.
        max_token_id: The largest token id in the shards.
        dtype: The numpy name of the integer type of a token.
        source_files: The files that were read, in order.
        text_key: The JSON key or parquet column that held the text.
        append_eod: Whether every document ends with `eod_token_id`.
        num_skipped_documents: The documents without a token, which were left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    eod_token_id: int = Field(ge=0)
    special_tokens: dict[str, int]
    num_documents: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    max_token_id: int = Field(ge=0)
    dtype: str
    source_files: list[SourceFile]
    text_key: str = "text"
    append_eod: bool = True
    num_skipped_documents: int = Field(default=0, ge=0)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads and checks a manifest.

        Args:
            path: The JSON file.

        Returns:
            The manifest.

        Raises:
            DataError: The file cannot be read, is not JSON, or has a wrong field.
        """
        remedy = "write the shards again with tools/preprocess_data.py --overwrite."
        try:
            fields = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}): {remedy}") from error
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise DataError(
                f"{path} is not a shard manifest: {field}: {first['msg']}: {remedy}"
            ) from error

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON, whole or not at all.

        Args:
            path: The JSON file to create or replace.
        """
        with whole_file(path) as stream:
            stream.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")


def check_manifest(
    manifest: Manifest, *, path: Path, vocab_size: int, tokenizer_sha256: str | None = None
) -> None:
    """Checks that a run can train on the shards that a manifest describes.

    The two vocabularies must be equal: padding and the mask token are rows of the model that
    `model.vocab_size` does not count.

    Args:
        manifest: The manifest of the shards.
        path: The manifest's file, for messages.
        vocab_size: The run's number of token ids, `model.vocab_size`.
        tokenizer_sha256: The hash of the run's tokenizer, or None to leave it unchecked.

    Raises:
        DataError: The shards were made for another vocabulary or by another tokenizer.
    """
    again = "run tools/preprocess_data.py again with the run's tokenizer"
    if manifest.vocab_size != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is not the vocabulary of {path}, which has "
            f"{manifest.vocab_size} tokens: set model.vocab_size={manifest.vocab_size}, or {again}."
        )
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{path} was made by the tokenizer {manifest.tokenizer!r} "
            f"(sha256 {manifest.tokenizer_sha256[:12]}) and the run's tokenizer differs "
            f"(sha256 {tokenizer_sha256[:12]}): {again}, or run with {manifest.tokenizer!r}."
        )
