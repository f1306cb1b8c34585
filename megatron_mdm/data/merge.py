"""Merging: the parts that an array job wrote become one stream, by reference or copied."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import check_free_space, write_errors
from megatron_mdm.data.manifest import Manifest, SourceFile, manifest_path, part_prefix
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import TokenShards, exist_whole, shard_paths
from megatron_mdm.data.source import split_range
from megatron_mdm.data.store import TokenStore, is_view, open_tokens
from megatron_mdm.data.view_writer import write_view
from megatron_mdm.data.writer import ShardWriter

_LOG = logging.getLogger(__name__)
_PART_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})\.json")
_MUST_AGREE = (
    "tokenizer_sha256",
    "vocab_size",
    "eod_token_id",
    "special_tokens",
    "text_key",
    "append_eod",
    "prepend_eod",
    "ids",
    "dtype",
    "valid_fraction",
    "split",
)


def merge_parts(prefix: Path, copy: bool = False, overwrite: bool = False) -> TokenStore:
    """Puts the parts at PREFIX.parts together at PREFIX, in their order.

    A view refers to the parts and copies nothing. A copy has the bytes, manifest included, that one
    process would have written for the same input. Parts without documents add nothing.

    Args:
        prefix: The path of the whole, without extension.
        copy: Whether to write one pair of shards instead of a view.
        overwrite: Whether to replace other shards at that path. A view of a merge is replaced
            anyway, since it holds no tokens.

    Returns:
        The whole, open.

    Raises:
        DataError: A part is missing or damaged, parts do not belong together, none has tokens,
            other shards exist at that path, or the disk is full.
    """
    parts = _open_parts(prefix)
    manifest = _merge_manifests(prefix, parts)
    if not overwrite and _is_copy(prefix, manifest):
        _LOG.info("reusing %s: it is a copy of the same parts", prefix)
        return open_tokens(prefix)
    with write_errors(prefix):
        if copy:
            _copy(prefix, parts, manifest)
        else:
            _refer(prefix, parts, manifest)
    return open_tokens(prefix)


def remove_parts(prefix: Path) -> None:
    """Removes the parts of which PREFIX is a copy that is whole and on disk.

    Args:
        prefix: The path of the whole, without extension.

    Raises:
        DataError: PREFIX is no whole copy of the parts, or they cannot be removed.
    """
    parts = _open_parts(prefix)
    whole = None if is_view(prefix) else TokenShards.open(prefix)
    if whole is None or whole.manifest != _merge_manifests(prefix, parts):
        raise DataError(
            f"{prefix} is no copy of its parts, so they are kept: merge them with --copy first."
        )
    whole.index.verify()
    with write_errors(prefix):
        folder = os.open(prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for part in parts:
            for path in shard_paths(part.prefix):
                path.unlink(missing_ok=True)
    # Other files there, such as logs, are not ours to remove.
    with suppress(OSError):
        parts[0].prefix.parent.rmdir()


def _open_parts(prefix: Path) -> list[TokenShards]:
    folder = part_prefix(prefix, 0, 1).parent
    remedy = "run the tasks of the array job that are missing again."
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match for match in map(_PART_NAME.fullmatch, names) if match]
    counts = sorted({int(match[2]) for match in found})
    if not counts:
        raise DataError(f"{folder} holds no finished part: {remedy}")
    if len(counts) > 1:
        raise DataError(
            f"{folder} holds parts of array jobs of {counts[0]} and of {counts[1]} tasks: remove "
            "those of one."
        )
    present = {int(match[1]) for match in found}
    missing = [task for task in range(counts[0]) if task not in present]
    if missing or len(present) != counts[0]:
        told = ", ".join(map(str, missing[:10])) + (" and more" if len(missing) > 10 else "")
        raise DataError(
            f"{folder} holds {len(present)} of {counts[0]} parts, those numbered {told} are "
            f"missing: {remedy}"
        )
    parts = []
    for task in range(counts[0]):
        part = TokenShards.open(part_prefix(prefix, task, counts[0]), allow_empty=True)
        if part.manifest is None or part.manifest.task not in (None, (task, counts[0])):
            raise DataError(
                f"{manifest_path(part.prefix)} does not describe task {task} of {counts[0]}: run "
                "that task of the array job again."
            )
        part.index.verify()
        parts.append(part)
    return parts


def _merge_manifests(prefix: Path, parts: Sequence[TokenShards]) -> Manifest:
    manifests = [part.manifest for part in parts if part.manifest is not None]
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        for name in _MUST_AGREE:
            if getattr(manifest, name) != getattr(first, name):
                raise DataError(
                    f"{manifest_path(part.prefix)} has {name}={getattr(manifest, name)!r} and the "
                    f"first part {getattr(first, name)!r}: make all parts with one command."
                )
    merged = first.model_copy(
        update={
            "num_documents": sum(manifest.num_documents for manifest in manifests),
            "num_tokens": sum(manifest.num_tokens for manifest in manifests),
            "max_token_id": max(manifest.max_token_id for manifest in manifests),
            "num_skipped_documents": sum(item.num_skipped_documents for item in manifests),
            "num_bad_records": sum(manifest.num_bad_records for manifest in manifests),
            "source_files": _merge_sources(parts, manifests),
            "task": None,
        }
    )
    if not merged.num_tokens:
        raise DataError(
            f"{prefix}: the parts hold no tokens: give input with at least one document that is "
            "not empty."
        )
    return merged


def _merge_sources(parts: Sequence[TokenShards], manifests: Sequence[Manifest]) -> list[SourceFile]:
    """Returns the files in order; the slices of a file that was cut over parts become one file."""
    merged: list[SourceFile] = []
    previous: SourceFile | None = None
    for part, manifest in zip(parts, manifests, strict=True):
        for file in manifest.source_files:
            whole = file.model_copy(update={"start": None, "stop": None})
            if not file.start:
                merged.append(whole)
            elif previous is None or previous.stop != file.start or merged[-1] != whole:
                raise DataError(
                    f"{manifest_path(part.prefix)} was made of {file.path} from {file.start} on, "
                    "and the parts before it do not end there: make all parts with one command."
                )
            previous = file
    return merged


def _is_copy(prefix: Path, manifest: Manifest) -> bool:
    """Tells whether shards at a path are a copy of the parts; raises where something else is."""
    remedy = "replace it with --overwrite or move it away."
    if is_view(prefix):
        if ViewRecord.read(manifest_path(prefix)).made_by != "merge":
            raise DataError(f"{prefix} exists and is a subset: {remedy}")
        return False
    exists = exist_whole([prefix], remedy)
    if exists and TokenShards.open(prefix).manifest != manifest:
        raise DataError(f"{prefix} exists and was not made of the same parts: {remedy}")
    return exists


def _refer(prefix: Path, parts: Sequence[TokenShards], manifest: Manifest) -> None:
    view = ViewRecord(
        made_by="merge",
        num_documents=manifest.num_documents,
        num_tokens=manifest.num_tokens,
        dtype=manifest.dtype,
        parts=[ViewPart.of(part, prefix.parent) for part in parts if part.num_tokens],
        manifest=manifest,
    )
    write_view(prefix, view)


def _copy(prefix: Path, parts: Sequence[TokenShards], manifest: Manifest) -> None:
    needed_bytes = manifest.num_tokens * parts[0].dtype.itemsize + 24 * manifest.num_documents
    check_free_space(prefix.parent, needed_bytes, "the copy needs", "merge without --copy")
    with ShardWriter(prefix, parts[0].dtype) as writer:
        for part in parts:
            for start, stop in split_range(part.num_documents):
                located_N2 = part.index.locate_documents(np.arange(start, stop))
                writer.append_stored(part, int(located_N2[0, 0]), located_N2[:, 1])
        writer.finish(manifest)
