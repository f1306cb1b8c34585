"""Append-only JSONL files of a run, and their reader."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import open_whole_file
from megatron_mdm.core.remarks import warn

# JSON has no non-finite numbers and null would not tell a NaN loss from an infinite one.
_NON_FINITE_NAMES: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RecordLog:
    """Appends records to a file, one JSON object per line, one write per line.

    A killed process leaves at most one partial last line. What the disk does not take stays in
    memory and is written later; that is warned of once and does not end a run. Non-finite floats
    are written as the strings "nan", "inf" and "-inf", which `read_records` turns back into floats;
    text may therefore not have these values. Only one process of a run may own a log.

    Args:
        path: The file; its folder is there.
        resume_step: None for a fresh start: an existing file is moved to `NAME.1`, or the next free
            number. Otherwise the step of the checkpoint that the run continues from, 0 or greater:
            lines of later steps are dropped, so that no step stands twice.

    Raises:
        DataError: The file to continue holds a damaged line other than a partial last one.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        if resume_step is None:
            _move_aside(path)
        elif path.exists():
            _drop_after(path, resume_step)
        self._path = path
        self._unwritten: list[bytes] = []
        self._has_warned = False
        # Unbuffered: a buffer would keep what a full disk refused, and nobody could tell how much.
        self._file: BinaryIO = path.open("ab", buffering=0)

    @property
    def num_unwritten(self) -> int:
        """Records that are in memory alone."""
        return len(self._unwritten)

    @property
    def is_closed(self) -> bool:
        """Was it closed?"""
        return self._file.closed

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record.

        Args:
            record: Names and values, with the optimizer step as the integer `step`.

        Raises:
            ValueError: `step` is missing or no integer, or a text reads as a non-finite number.
        """
        step = record.get("step")
        if not isinstance(step, int):
            raise ValueError(f"record['step']={step!r} is not an integer: every record needs one.")
        self._unwritten.append(_encode_line(record))
        self._write()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if not self._file.closed:
            self._write()
            self._file.close()

    def _write(self) -> None:
        while self._unwritten:
            size_bytes = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(self._unwritten[0]) != len(self._unwritten[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(size_bytes)
                if not self._has_warned:
                    self._has_warned = True
                    warn(
                        f"{self._path} cannot be written ({error.strerror}): the run goes on and "
                        "writes it when that is possible again."
                    )
                return
            del self._unwritten[0]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Reads a log, also while a run is writing it.

    Args:
        path: The JSONL file.

    Yields:
        The records in file order; "nan", "inf" and "-inf" are floats again. A partial last line is
        left out.

    Raises:
        DataError: The file is missing, or a line other than a partial last one is damaged.
    """
    for _, record in _read_lines(path):
        yield record


def _encode_line(record: Mapping[str, Any]) -> bytes:
    for name, value in record.items():
        if isinstance(value, str) and value in _NON_FINITE_NAMES:
            raise ValueError(
                f"record[{name!r}]={value!r} is text that reads as a number: log a float."
            )
    encoded = {name: _encode(value) for name, value in record.items()}
    return json.dumps(encoded, allow_nan=False).encode() + b"\n"


def _encode(value: Any) -> Any:
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE_NAMES.get(value, value) if isinstance(value, str) else value


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each whole line, newline included, with its record."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the directory of a run that logged metrics.")
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield line + b"\n", _decode_line(line)
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is damaged ({error}): every line but a partial last one "
                "must be a JSON object with an integer step; delete the line or move the file away."
            ) from error
    # A kill may have cut off the newline alone; then the last record is whole.
    try:
        record = _decode_line(last)
    except ValueError:
        return
    yield last + b"\n", record


def _decode_line(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no JSON object with an integer step")
    return {name: _decode(value) for name, value in record.items()}


def _move_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(kept)


def _drop_after(path: Path, resume_step: int) -> None:
    with open_whole_file(path) as file:
        for line, record in _read_lines(path):
            if record["step"] <= resume_step:
                file.write(line)
