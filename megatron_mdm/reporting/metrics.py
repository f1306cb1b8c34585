"""The curve of a run: its records, and which of its validations is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mdm.reporting.record_log import RecordLog, read_records
from megatron_mdm.reporting.remarks import warn

METRICS_FILE_NAME = "metrics.jsonl"
VALIDATIONS_FILE_NAME = "validations.jsonl"
NLL = "valid/nll_nats_per_token"
# The loss that objectives are compared by: of the tokens that AR predicts too.
MATCHED_NLL = "valid/nll_given_first_nats_per_token"
# A run that goes on may be judged on other windows than before.
_JUDGED_ON = ("valid/noise_seed", "valid/num_tokens")

MetricValue = int | float | str


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
    """Writes a run's metrics to `<run_dir>/metrics.jsonl` and hands them on to sinks.

    Beside them, `validations.jsonl` takes what is too long for a curve: every judged window's loss.
    Both are as `RecordLog` says. A sink that fails is warned of once and left out from then on.

    Args:
        run_dir: Directory of the run; made when absent.
        resume_step: As for `RecordLog`.
        sinks: Further places that every record of metrics goes to, after the file.

    Raises:
        DataError: A file to continue holds a damaged line other than a partial last one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = RecordLog(run_dir / METRICS_FILE_NAME, resume_step)
        self._windows = RecordLog(run_dir / VALIDATIONS_FILE_NAME, resume_step)
        self._sinks = list(sinks)

    @property
    def num_unwritten(self) -> int:
        """Records that are in memory alone."""
        return self._metrics.num_unwritten + self._windows.num_unwritten

    def log(self, record: Mapping[str, MetricValue]) -> None:
        """Writes one record.

        Args:
            record: Metric name to value, with the optimizer step as the integer `step`.

        Raises:
            ValueError: `step` is missing or no integer, or a text value reads as a
                non-finite number.
        """
        self._metrics.append(record)
        for sink in list(self._sinks):
            try:
                sink.log(record, record["step"])  # type: ignore[arg-type]
            # Sinks are other people's libraries, networks and disks.
            except Exception as error:
                self._sinks.remove(sink)
                warn(f"{type(sink).__name__} failed ({error}) and gets nothing more of this run.")

    def log_windows(self, record: Mapping[str, Any]) -> None:
        """Writes the losses of the windows of one validation; sinks do not get them.

        Args:
            record: Of `JudgedWindows.as_record`.
        """
        self._windows.append(record)

    def close(self) -> None:
        """Closes the files and every sink; a second call does nothing."""
        if self._metrics.is_closed:
            return
        self._metrics.close()
        self._windows.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                warn(f"{type(sink).__name__} could not be closed ({error}).")


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
    return list(read_records(path))


def read_validations(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics file that hold a held-out loss.

    Args:
        path: The JSONL file.

    Returns:
        The records in file order.

    Raises:
        DataError: As for `read_metrics`.
    """
    return [record for record in read_records(path) if NLL in record]


def matched_name(records: Sequence[Mapping[str, Any]]) -> str:
    """Names the loss by which a run is compared with others.

    Args:
        records: Records of the run.

    Returns:
        `MATCHED_NLL`, or `NLL` of a run that was logged before there was another.
    """
    judged = [record for record in records if NLL in record]
    return MATCHED_NLL if judged and all(MATCHED_NLL in one for one in judged) else NLL


def best_validation(
    records: Sequence[Mapping[str, Any]], name: str = NLL
) -> Mapping[str, Any] | None:
    """Finds the validation with the lowest held-out loss.

    Args:
        records: Records of a run, in order; those without a held-out loss do not count, nor those
            on other windows or other noise than the last.
        name: Which loss.

    Returns:
        The record, the earliest of equals; None if no loss is finite.
    """
    judged = [record for record in records if name in record]
    same = [
        record
        for record in judged
        if all(record.get(field) == judged[-1].get(field) for field in _JUDGED_ON)
        and math.isfinite(record[name])
    ]
    return min(same, key=lambda record: float(record[name]), default=None)
