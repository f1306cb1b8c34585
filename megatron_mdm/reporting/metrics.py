"""The curve of a run: an append-only JSONL file and its reader."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_mdm.errors import DataError
from megatron_mdm.files import whole_file
from megatron_mdm.reporting.remarks import warn

METRICS_FILE_NAME = "metrics.jsonl"
NLL = "valid/nll_nats_per_token"
# A run that goes on may be judged on other windows than before.
_JUDGED_ON = ("valid/noise_seed", "valid/num_tokens")

MetricValue = int | float | str

# JSON has no non-finite numbers and null would not tell a NaN loss from an infinite one.
_NON_FINITE_NAMES: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsSink(Protocol):
    """A second place that metrics go to, besides the JSONL file."""

    def log(self, record: Mapping[str, MetricValue], step: int) -> None:
        """Takes one record.

        Args:
            record: Metric name to value; names are `group/name_unit`.
            step: Optimizer step of the record, 0 or greater.
        """
        ...

    def close(self) -> None:
        """Writes out what is buffered and ends the sink."""
        ...


class MetricsLogger:
    """Appends records to `<run_dir>/metrics.jsonl` and hands them on to sinks.

    One JSON object a line, one write a line: a killed process leaves at most one partial last
    line. What the disk does not take stays in memory and is written later; a sink that fails is
    left out from then on. Each is warned of once, and neither ends a run. Non-finite floats are
    written as the strings "nan", "inf" and "-inf", which `read_metrics` turns back into floats;
    text metrics may therefore not have these values. Only one process of a run may own a logger.

    Args:
        run_dir: Directory of the run; made when absent.
        resume_step: None for a fresh start: an existing file is moved to `metrics.jsonl.1`, or
            the next free number. Otherwise the step of the checkpoint that the run continues
            from, 0 or greater: lines of later steps are dropped, so that no step stands twice.
        sinks: Further places that every record goes to, after the file.

    Raises:
        DataError: The file to continue holds a damaged line other than a partial last one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE_NAME
        if resume_step is None:
            _move_aside(path)
        elif path.exists():
            _drop_after(path, resume_step)
        self._sinks = list(sinks)
        self._path = path
        self._unwritten: list[bytes] = []
        self._has_warned = False
        # Without a buffer, which would keep what a full disk refused and lose track of it.
        self._file: BinaryIO = path.open("ab", buffering=0)

    @property
    def num_unwritten(self) -> int:
        """Records that are in memory alone."""
        return len(self._unwritten)

    def log(self, record: Mapping[str, MetricValue]) -> None:
        """Writes one record.

        Args:
            record: Metric name to value, with the optimizer step as the integer `step`.

        Raises:
            ValueError: `step` is missing or no integer, or a text value reads as a
                non-finite number.
        """
        step = record.get("step")
        if not isinstance(step, int):
            raise ValueError(f"record['step']={step!r} is not an integer: every record needs one.")
        self._unwritten.append(_encode_line(record))
        self._write()
        for sink in list(self._sinks):
            try:
                sink.log(record, step)
            # Sinks are other people's libraries, networks and disks.
            except Exception as error:
                self._sinks.remove(sink)
                warn(f"{type(sink).__name__} failed ({error}) and gets nothing more of this run.")

    def close(self) -> None:
        """Closes the file and every sink; a second call does nothing."""
        if self._file.closed:
            return
        self._write()
        self._file.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                warn(f"{type(sink).__name__} could not be closed ({error}).")

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file, also while a run is writing it.

    Args:
        path: The JSONL file.

    Returns:
        The records in file order; "nan", "inf" and "-inf" are floats again. A partial last
        line is left out.

    Raises:
        DataError: The file is missing, or a line other than a partial last one is damaged.
    """
    return [record for _, record in _read_lines(path)]


def read_validations(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics file that hold a held-out loss.

    Args:
        path: The JSONL file.

    Returns:
        The records in file order.

    Raises:
        DataError: As for `read_metrics`.
    """
    return [record for _, record in _read_lines(path) if NLL in record]


def best_validation(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Finds the validation with the lowest held-out loss.

    Args:
        records: Records of a run, in order; those without a held-out loss do not count, nor those
            on other windows or other noise than the last.

    Returns:
        The record, the earliest of equals; None if no loss is finite.
    """
    judged = [record for record in records if NLL in record]
    same = [
        record
        for record in judged
        if all(record.get(name) == judged[-1].get(name) for name in _JUDGED_ON)
        and math.isfinite(record[NLL])
    ]
    return min(same, key=lambda record: float(record[NLL]), default=None)


def _encode_line(record: Mapping[str, MetricValue]) -> bytes:
    encoded: dict[str, MetricValue] = {}
    for name, value in record.items():
        if isinstance(value, str) and value in _NON_FINITE_NAMES:
            raise ValueError(
                f"record[{name!r}]={value!r} is text that reads as a number: log a float."
            )
        if isinstance(value, float) and not math.isfinite(value):
            value = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        encoded[name] = value
    return json.dumps(encoded, allow_nan=False).encode() + b"\n"


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
    # A kill may have cut off no more than the newline; then the last record is whole.
    try:
        record = _decode_line(last)
    except ValueError:
        return
    yield last + b"\n", record


def _decode_line(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no JSON object with an integer step")
    return {
        name: _NON_FINITE_NAMES.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


def _move_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(kept)


def _drop_after(path: Path, resume_step: int) -> None:
    with whole_file(path) as file:
        for line, record in _read_lines(path):
            if record["step"] <= resume_step:
                file.write(line)
