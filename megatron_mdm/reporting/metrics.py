"""The metrics of a run: how records are written and read, and which validation is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mdm.core.remarks import warn
from megatron_mdm.reporting.record_log import RecordLog, read_records

METRICS_FILE_NAME = "metrics.jsonl"
VALIDATIONS_FILE_NAME = "validations.jsonl"
NLL = "valid/nll_nats_per_token"
TRAIN_NLL = "train/nll_nats_per_token"
GAP = "valid/gap_nats_per_token"
# Over the tokens that AR predicts too.
MATCHED_NLL = "valid/nll_given_first_nats_per_token"
# A resumed run may be validated on other windows than before.
_JUDGED_ON = ("valid/noise_seed", "valid/num_tokens")

MetricValue = int | float | str


class MetricsSink(Protocol):
    """A further place that metrics go to, besides the JSONL file."""

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
        self, run_dir: Path, *, resume_step: int | None, sinks: Sequence[MetricsSink] = ()
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


def name_average_group(average: str) -> str:
    """Group of the metrics of an average of the weights, as in `valid_ema/nll_nats_per_token`."""
    return f"valid_{average}"


def list_averages(record: Mapping[str, Any]) -> list[str]:
    """Names of the averages of the weights whose held-out loss a record holds."""
    start, end = name_average_group(""), NLL.partition("/")[2]
    groups = [name.partition("/") for name in record if name.startswith(start)]
    return [group.removeprefix(start) for group, _, metric in groups if metric == end]


def name_judge(judge: str) -> str:
    """Metric of a loss of a run that has several, as in `valid/as_ar_nll_nats_per_token`."""
    return NLL.replace("nll", f"as_{judge}_nll")


def list_judges(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the losses that records hold where a run has several."""
    start, end = name_judge("|").split("|")
    found = (
        name.removeprefix(start).removesuffix(end)
        for record in records
        for name in record
        if name.startswith(start) and name.endswith(end)
    )
    return list(dict.fromkeys(found))


def match_records(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Matches the records of a run with those of others, by losses that can be compared.

    AR predicts all tokens but the first of a text, and MDM all. Runs are compared by the loss over
    those that both predict.

    Args:
        records: Records of a run.

    Returns:
        The records, with that loss, its errors and the gap of it in the place of a run's own. Those
        of a run that was logged before it was measured stay as they are.
    """
    return [_match(record) for record in records]


def _match(record: Mapping[str, Any]) -> dict[str, Any]:
    matched = {name: value for name, value in record.items() if "/nll_given_first_" not in name}
    for name, value in record.items():
        if "/nll_given_first_" in name:
            matched[name.replace("/nll_given_first_", "/nll_")] = value
    if GAP in record:
        matched[GAP] = matched[NLL] - matched[TRAIN_NLL]
    return matched


def find_best_validation(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
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
