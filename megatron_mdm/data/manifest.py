"""The manifest that lies beside a pair of token shards and says where they came from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_mdm.core.errors import DataError, unreadable_error
from megatron_mdm.core.files import open_whole_file, read_json

_WHOLLY_HASHED_BYTES = 16 << 20
_NUM_HASHED_BLOCKS = 256
_HASHED_BLOCK_BYTES = 64 << 10


def _is_unused(value: object) -> bool:
    # Shards that do without a field of later versions have the bytes that earlier ones wrote.
    return not value


def manifest_path(prefix: Path) -> Path:
    """Names the manifest of a pair of shards.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.

    Returns:
        The path of the manifest: the prefix with `.json` after it.
    """
    return Path(f"{prefix}.json")


def part_prefix(prefix: Path, task: int, num_tasks: int) -> Path:
    """Names the shards that one task of an array job makes of its share of the input.

    Args:
        prefix: The path of the whole, without `.bin` and `.idx`.
        task: The task, from 0.
        num_tasks: The tasks in all.

    Returns:
        The path of the part without `.bin` and `.idx`, such as
        `PREFIX.parts/part-00003-of-00016`.
    """
    return Path(f"{prefix}.parts") / f"part-{task:05d}-of-{num_tasks:05d}"


class Record(BaseModel):
    """What a JSON file of a token store says. Frozen, and without fields that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: ClassVar[str] = "a record"
    remedy: ClassVar[str] = "write it again with the tool that made it."

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and checks a file.

        Args:
            path: The JSON file.

        Returns:
            What it says.

        Raises:
            DataError: The file cannot be read, is not JSON, or has a wrong field.
        """
        try:
            return cls.model_validate(cls._select_fields(read_json(path, cls.remedy)))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the whole file"
            complaint = f"is not {cls.what}: {name}: {first['msg']}"
            if first["type"] == "value_error" and not first["loc"]:
                # A contradiction between fields, which the record's own check describes.
                complaint = str(first["ctx"]["error"])
            raise DataError(f"{path} {complaint}: {cls.remedy}") from error

    def write(self, path: Path) -> None:
        """Writes the record as JSON, whole or not at all.

        Args:
            path: The JSON file to create or replace.
        """
        with open_whole_file(path) as stream:
            stream.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")

    @classmethod
    def _select_fields(cls, tree: Any) -> Any:
        return tree


class SourceFile(Record):
    """One file that was read to make the shards.

    Attributes:
        path: The path as it was given.
        size_bytes: The size of the file.
        sha256: A SHA-256 in hexadecimal, or None where it was not computed. Up to 16 MiB it is
            that of the content. Of a larger file it is that of the size in decimal ASCII digits,
            followed by 256 blocks of 64 KiB, block i starting at byte
            floor(i * (size - 65536) / 255): cheap at any size, and blind to a change that keeps
            the size and falls between the blocks.
        start: Where the slice of the file that was read starts, in bytes, or in rows for parquet
            files and saved data sets; None if the whole file was read.
        stop: Where that slice ends, exclusive; None if the whole file was read.
    """

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str | None = None
    start: int | None = Field(default=None, ge=0)
    stop: int | None = Field(default=None, ge=0)

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Describes a whole file on disk. Reads at most 16 MiB of it.

        Args:
            path: The file.

        Returns:
            Its path, size and hash.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            with path.open("rb") as stream:
                size_bytes = os.fstat(stream.fileno()).st_size
                if size_bytes <= _WHOLLY_HASHED_BYTES:
                    content = stream.read(_WHOLLY_HASHED_BYTES + 1)
                    # A file may be growing, and its size and hash belong together.
                    size_bytes = len(content)
                    digest = hashlib.sha256(content)
                else:
                    digest = hashlib.sha256(str(size_bytes).encode())
                    last = size_bytes - _HASHED_BLOCK_BYTES
                    for block in range(_NUM_HASHED_BLOCKS):
                        stream.seek(block * last // (_NUM_HASHED_BLOCKS - 1))
                        digest.update(stream.read(_HASHED_BLOCK_BYTES))
        except OSError as error:
            raise unreadable_error(path, error) from error
        return cls(path=str(path), size_bytes=size_bytes, sha256=digest.hexdigest())

    def has_content_of(self, other: SourceFile) -> bool:
        """Tells whether two files hold the same documents, wherever their folders are.

        Args:
            other: The other file.

        Returns:
            True when name, size, hash and slice agree and the hash is known.
        """

        def content(file: SourceFile) -> tuple[str, int, str | None, int | None, int | None]:
            return Path(file.path).name, file.size_bytes, file.sha256, file.start, file.stop

        return self.sha256 is not None and content(self) == content(other)


class SubsetRecipe(Record):
    """What decides the content of a subset.

    Attributes:
        source: The path of the parent without extension, as it was given.
        source_fingerprint: The parent's fingerprint when the subset was made.
        num_tokens: The tokens that were asked for.
        seed: The seed of the document order; None: documents stay in the parent's order.
        num_skipped_tokens: The tokens before it in that order, whose last document is left out
            whole.
    """

    source: str
    source_fingerprint: str
    num_tokens: int = Field(ge=1)
    seed: int | None = Field(ge=0)
    num_skipped_tokens: int = Field(default=0, ge=0, exclude_if=_is_unused)

    def describe(self) -> str:
        """Says in a few words what was taken from where."""
        order = "in its order" if self.seed is None else f"seed {self.seed}"
        behind = f" behind the first {self.num_skipped_tokens}" if self.num_skipped_tokens else ""
        return f"{self.source}, {self.num_tokens} tokens{behind}, {order}"


class PromptResponseRecipe(Record):
    """What made documents of prompts and responses.

    Attributes:
        prompt_key: The JSON key of the prompt.
        response_key: The JSON key of the response.
        turns: Which answers of a conversation are learned.
        chat_template: The Jinja template of messages.
        prompts_sha256: A SHA-256 of the file of prompt lengths, in hexadecimal.
        has_messages: Whether any of them were messages, which the template made text of; None: not
            recorded.
    """

    prompt_key: str
    response_key: str
    turns: Literal["each", "last"]
    chat_template: str
    prompts_sha256: str
    has_messages: bool | None = None


class IdsRecipe(Record):
    """How tokens that were there already were read.

    Attributes:
        key: The JSON key or column of the ids; None for files of tokens.
        split_at_eod: Whether they were one stream, cut after each end-of-document id. The last
            document may then lack that id.
        hold_out_by: What was hashed to divide them.
    """

    key: str | None
    split_at_eod: bool
    hold_out_by: Literal["ids", "text"] = "ids"


class Manifest(Record):
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
        max_token_id: The largest token id in the shards; of a subset, that of its parent.
        dtype: The numpy name of the integer type of a token.
        source_files: The files that were read, in order.
        text_key: The JSON key or parquet column that held the text, where it was text.
        append_eod: Whether every document ends with `eod_token_id`.
        prepend_eod: Whether every document begins with `eod_token_id` instead.
        max_tokens: The tokens after which no more was read, None where all was.
        num_skipped_documents: The documents without a token, which were left out.
        num_bad_records: The records that could not be read and were left out on request.
        valid_fraction: The share of documents that is held out, None where nothing was.
        split: Which side of that division the shards hold, None for all documents.
        task: Number, from 0, and count of the array job's tasks for a part; None for a whole.
        subset: How a subset was cut out of its parent, None for what is no subset.
        exchanges: How prompts and responses were made, None for documents of plain text.
        ids: How tokens were read that were there already, None for text.
    """

    what = "a shard manifest"
    remedy = "write the shards again with mdm prepare --overwrite."

    format_version: Literal[1] = 1
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    eod_token_id: int = Field(ge=0)
    special_tokens: dict[str, int]
    num_documents: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    max_token_id: int = Field(ge=0)
    dtype: str
    source_files: list[SourceFile]
    text_key: str = "text"
    append_eod: bool = True
    prepend_eod: bool = Field(default=False, exclude_if=_is_unused)
    max_tokens: int | None = Field(default=None, ge=1, exclude_if=_is_unused)
    num_skipped_documents: int = Field(default=0, ge=0)
    num_bad_records: int = Field(default=0, ge=0)
    valid_fraction: float | None = Field(default=None, ge=0, lt=1)
    split: Literal["train", "valid"] | None = None
    task: tuple[int, int] | None = None
    subset: SubsetRecipe | None = None
    exchanges: PromptResponseRecipe | None = None
    ids: IdsRecipe | None = None

    @classmethod
    def _select_fields(cls, tree: Any) -> Any:
        # A view has the manifest of its tokens inside.
        is_view = isinstance(tree, dict) and tree.get("kind") == "view"
        return tree.get("manifest") if is_view else tree


def check_manifest(
    manifest: Manifest,
    *,
    path: Path,
    vocab_size: int,
    tokenizer_sha256: str | None = None,
    export: Path | None = None,
    num_rows: int | None = None,
) -> None:
    """Checks that a model can read the shards that a manifest describes.

    Their vocabulary may be smaller than the model's: ids that it lacks stand in no text.

    Args:
        manifest: The manifest of the shards.
        path: The manifest's file, for messages.
        vocab_size: Token ids of the model: `model.vocab_size`, or those that an export predicts.
        tokenizer_sha256: The hash of the model's tokenizer, or None to leave it unchecked.
        export: The exported model, which says itself what it is; None: a run's, whose configuration
            can be changed.
        num_rows: Rows of the run's vocabulary where it has no others, as weights that it begins
            with; None: as many as are asked for.

    Raises:
        DataError: The shards were made for a larger vocabulary or by another tokenizer.
    """
    owner = "the run" if export is None else str(export)
    remedies = [f"run mdm prepare again with the tokenizer of {owner}"]
    if manifest.vocab_size > vocab_size:
        name = f"the {vocab_size} of {export}"
        if export is None:
            name = f"model.vocab_size={vocab_size}"
            if num_rows is None or manifest.vocab_size <= num_rows:
                remedies.insert(0, f"set model.vocab_size={manifest.vocab_size}")
        raise DataError(
            f"{path} has a vocabulary of {manifest.vocab_size} tokens, more than {name}: "
            f"{', or '.join(remedies)}."
        )
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 != tokenizer_sha256:
        if export is None:
            remedies.append(f"set data.tokenizer={manifest.tokenizer}")
        raise DataError(
            f"{path} was made by the tokenizer {manifest.tokenizer!r} "
            f"(sha256 {manifest.tokenizer_sha256[:12]}) and that of {owner} differs "
            f"(sha256 {tokenizer_sha256[:12]}): {', or '.join(remedies)}."
        )
