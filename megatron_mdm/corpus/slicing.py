"""Divides a corpus by what its records say of themselves: by domain, or by slices of time."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import open_whole_file, write_errors
from megatron_mdm.corpus.readers import open_lines, read_objects
from megatron_mdm.corpus.records import BadRecord, BadRecordError, pick_value

By = Literal["value", "year", "quarter", "month", "day"]
# Each slice is a file that is open all the time.
_MAX_SLICES = 256
_SAFE_NAME = re.compile(r"[\w][\w.+-]*", re.ASCII)


def slice_corpus(inputs: Sequence[Path], output: Path, key: str, by: By) -> dict[str, int]:
    """Writes a `.jsonl` file for each slice, all of them or none.

    Args:
        inputs: `.jsonl` files, perhaps compressed.
        output: Folder of the slices, which is made; it must not hold any `.jsonl` file.
        key: Key whose value decides.
        by: `value`: a slice each value; otherwise the value is a date of ISO 8601 or seconds since
            1970, and a slice is a period of it, such as 2024-03 or 2024-Q1.

    Returns:
        Records of each slice, by its name, in order of the names.

    Raises:
        DataError: A record has no such key, its value names no slice, or there are too many.
    """
    sources = open_lines(inputs, "give records of JSON, one per line.")
    if list(output.glob("*.jsonl")):
        raise DataError(f"--output={output} holds .jsonl files already: choose another folder.")
    counts: dict[str, int] = {}
    with write_errors(output), contextlib.ExitStack() as stack:
        if not output.exists():
            # After the files, which a bad record leaves none of.
            stack.callback(_remove_if_empty, output)
        output.mkdir(parents=True, exist_ok=True)
        files: dict[str, BinaryIO] = {}
        for where, record in read_objects(sources, lambda fields: _name_slice(fields, key, by)):
            if isinstance(record, BadRecord):
                raise DataError(where + record.complaint)
            name, fields = record
            if name not in files:
                if len(files) == _MAX_SLICES:
                    raise DataError(
                        f"{where}: {key}={name} would be slice number {_MAX_SLICES + 1}: divide by "
                        "longer periods, or by another key."
                    )
                files[name] = stack.enter_context(open_whole_file(output / f"{name}.jsonl"))
            line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
            files[name].write(line + b"\n")
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _name_slice(fields: dict[str, Any], key: str, by: By) -> tuple[str, dict[str, Any]]:
    """Names the slice of a record; returns it and the record."""
    value = pick_value(fields, key, "--key")
    if by == "value":
        if not isinstance(value, str) or not _SAFE_NAME.fullmatch(value):
            raise BadRecordError(
                f": {key}={value!r} cannot name a file: use values of letters, digits and ._+- "
                "alone, or divide by a date with --by."
            )
        return value, fields
    date = _parse_date(value)
    if date is None:
        raise BadRecordError(
            f": {key}={value!r} is no date: give ISO 8601, such as 2024-03-31, or seconds since "
            "1970."
        )
    periods = {
        "year": f"{date:%Y}",
        "quarter": f"{date:%Y}-Q{(date.month + 2) // 3}",
        "month": f"{date:%Y-%m}",
        "day": f"{date:%Y-%m-%d}",
    }
    return periods[by], fields


def _parse_date(value: Any) -> datetime | None:
    try:
        if isinstance(value, str):
            found = datetime.fromisoformat(value.strip())
            # A date with an offset names a moment, as seconds do: slices are in UTC.
            return found if found.tzinfo is None else found.astimezone(UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None
