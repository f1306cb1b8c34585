"""What a user names as input, opened as sources and shared out over the tasks of an array job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.core.errors import DataError, unreadable_error
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.sources import (
    HubDataset,
    LinesSource,
    Source,
    SourceShare,
    Span,
    TextSource,
)
from megatron_mdm.corpus.streams import is_compressed

_LINES, _TEXTS = (".jsonl", ".ndjson", ".json"), (".txt",)
EXTENSIONS = (
    *(f"{name}{packed}" for name in (*_LINES, *_TEXTS) for packed in ("", ".gz", ".zst")),
    ".parquet",
)
TOKEN_EXTENSIONS = (".bin", ".npy", ".ds")
_TEXT = RecordKey()


def open_sources(
    inputs: Sequence[Path] | HubDataset, key: RecordKey = _TEXT, split: str | None = None
) -> list[Source]:
    """Checks that inputs exist and have a known format, before the work starts.

    Args:
        inputs: Files and folders, at least one, or a hub data set.
        key: The JSON key or column that holds the documents.
        split: Which split of folders that `DatasetDict.save_to_disk` wrote.

    Returns:
        The sources, in order.

    Raises:
        DataError: An input is missing or of an unknown format, or a split is missing.
    """
    # Imported here because pyarrow and datasets are slow to import and many corpora do without.
    if isinstance(inputs, HubDataset):
        from megatron_mdm.corpus.tables import HubSource

        return [HubSource(inputs, key)]
    if not inputs:
        raise DataError("--input names no file: give at least one.")
    if split is not None and not any((path / "dataset_dict.json").is_file() for path in inputs):
        raise DataError(
            f"--split={split} has nothing to choose from: leave it out, or give --dataset or a "
            "folder with several splits."
        )
    return [_open_source(path, key, split) for path in inputs]


def take_share(sources: Sequence[Source], task: int, num_tasks: int) -> list[SourceShare]:
    """Cuts the sources' bytes into equal ranges and names the records that start in one of them.

    Every record belongs to exactly one task, and the tasks' records in order are all records.

    Args:
        sources: The sources.
        task: The number of the range, from 0.
        num_tasks: The number of ranges, 1 or more.

    Returns:
        What the task reads, in order; nothing if there are fewer records than tasks.

    Raises:
        DataError: A source cannot be read or cannot be split.
    """
    if num_tasks == 1:
        return [SourceShare(source, Span()) for source in sources]
    total = sum(source.size_bytes for source in sources)
    low, high = task * total // num_tasks, (task + 1) * total // num_tasks
    if task == num_tasks - 1:
        high = total + 1  # An empty file at the end has its first byte there.
    shares = []
    for source in sources:
        if source.size_bytes and high > 0 and low < source.size_bytes:
            span = source.find_span(low, high)
        else:
            span = Span() if not source.size_bytes and low <= 0 < high else None
        if span is not None:
            shares.append(SourceShare(source, span))
        low, high = low - source.size_bytes, high - source.size_bytes
    return shares


def _open_source(path: Path, key: RecordKey, split: str | None) -> Source:
    try:
        if path.is_dir():
            return _open_folder(path, key, split)
        if not path.is_file():
            raise DataError(f"{path} is not a file: give an existing file as input.")
        name = path.name.lower()
        plain = name.removesuffix(path.suffix.lower()) if is_compressed(path) else name
        if plain.endswith(_LINES):
            return LinesSource(path)
        if plain.endswith(_TEXTS):
            if key.holds_ids:
                raise DataError(
                    f"{path} is text and {key.option}={key.name} names a column of token ids: give "
                    ".jsonl, .parquet or a saved data set, or leave the option out."
                )
            return TextSource(path)
        if name.endswith(".parquet"):
            from megatron_mdm.corpus.tables import ParquetSource

            return ParquetSource(path, key)
    except OSError as error:
        raise unreadable_error(path, error) from error
    raise DataError(
        f"{path} has an unknown extension: use one of {', '.join(EXTENSIONS)}, or for tokens one "
        f"of {', '.join(TOKEN_EXTENSIONS)} or any with --format."
    )


def _open_folder(path: Path, key: RecordKey, split: str | None) -> Source:
    from megatron_mdm.corpus.tables import SavedDatasetSource

    listing = path / "dataset_dict.json"
    if not listing.is_file():
        if not all((path / name).is_file() for name in ("dataset_info.json", "state.json")):
            raise DataError(
                f"{path} is a folder but not one that datasets.save_to_disk wrote: give files, or "
                "such a folder."
            )
        return SavedDatasetSource(path, key)
    try:
        splits = [str(name) for name in json.loads(listing.read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{listing} names no splits ({error}): copy the folder again.") from error
    if split not in splits:
        state = "holds several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"{path} {state}: choose one of {', '.join(splits)} with --split.")
    return SavedDatasetSource(path / str(split), key)
