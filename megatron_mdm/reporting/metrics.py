"""The curve of a run: an append-only JSONL file, its reader, and copies to W&B and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from megatron_mdm.errors import ConfigError, DataError
from megatron_mdm.files import whole_file

METRICS_FILE_NAME = "metrics.jsonl"
NLL = "valid/nll_nats_per_token"
# A run that goes on may be judged on other windows than before.
_JUDGED_ON = ("valid/noise_seed", "valid/num_tokens")

MetricValue = int | float | str
WandbMode = Literal["offline", "online"]

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
    line. Non-finite floats are written as the strings "nan", "inf" and "-inf", which
    `read_metrics` turns back into floats; text metrics may therefore not have these values.
    Only one process of a run may own a logger.

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
        self._sinks = tuple(sinks)
        self._file: BinaryIO = path.open("ab")

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
        self._file.write(_encode_line(record))
        self._file.flush()
        for sink in self._sinks:
            sink.log(record, step)

    def close(self) -> None:
        """Closes the file and every sink; a second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        for sink in self._sinks:
            sink.close()


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


class WandbSink:
    """Sends records to Weights & Biases, or to its offline files.

    Args:
        project: W&B project.
        run_name: Display name of the run.
        mode: "online" needs a login; "offline" writes files for `wandb sync` and needs none.
        dir: Directory under which W&B makes its own `wandb` directory; made when absent.
        config: Resolved settings of the run, shown with it.
        run_id: Identity of the run; a resumed run with the same one continues its W&B curve.
            W&B ignores steps that it already holds. None starts a new W&B run.

    Raises:
        ConfigError: wandb is not installed, or the online mode has no login.
    """

    def __init__(
        self,
        project: str,
        run_name: str,
        mode: WandbMode,
        dir: Path,
        config: Mapping[str, Any],
        *,
        run_id: str | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"reporting.wandb={mode} needs the wandb package, which is not installed: "
                "install it or set reporting.wandb=off."
            ) from error
        dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                mode=mode,
                dir=str(dir),
                config=dict(config),
                id=run_id,
                resume=None if run_id is None else "allow",
            )
        except wandb.Error as error:
            raise ConfigError(
                f"reporting.wandb={mode} could not start a W&B run ({error}): "
                "run `wandb login` or set reporting.wandb=offline."
            ) from error

    def log(self, record: Mapping[str, MetricValue], step: int) -> None:
        """Sends one record.

        Args:
            record: Metric name to value.
            step: Optimizer step; records of one step are merged by W&B.
        """
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=step)

    def close(self) -> None:
        """Ends the W&B run and waits until its data is written."""
        import wandb

        self._run.finish()
        # The service writes its files after finish() has returned; teardown waits for its end.
        wandb.teardown()


class TensorBoardSink:
    """Writes the numbers of each record as TensorBoard scalars; text values are left out.

    Args:
        dir: Log directory; made when absent.
        resume_step: Step that the run continues from, or None for a fresh start. TensorBoard
            hides earlier events of later steps.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, dir: Path, *, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "reporting.tensorboard=true needs the tensorboard package, which is not "
                "installed: install it or set reporting.tensorboard=false."
            ) from error
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(dir), purge_step=purge_step, flush_secs=30)

    def log(self, record: Mapping[str, MetricValue], step: int) -> None:
        """Writes the scalars of one record.

        Args:
            record: Metric name to value.
            step: Optimizer step, the x axis in TensorBoard.
        """
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Writes out what is buffered and closes the event file."""
        self._writer.close()


def build_sinks(
    run_dir: Path,
    *,
    wandb_mode: str = "off",
    wandb_project: str = "megatron_mdm",
    wandb_run_name: str | None = None,
    wandb_run_id: str | None = None,
    tensorboard: bool = False,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> list[MetricsSink]:
    """Builds the sinks that the reporting settings ask for.

    Args:
        run_dir: Directory of the run; W&B files go to `<run_dir>/wandb`, TensorBoard events to
            `<run_dir>/tensorboard`.
        wandb_mode: "off", "offline" or "online".
        wandb_project: W&B project.
        wandb_run_name: W&B display name; None takes the name of `run_dir`.
        wandb_run_id: W&B identity that a resumed run continues; None starts a new W&B run.
        tensorboard: Whether to write TensorBoard events.
        config: Resolved settings of the run, shown in W&B.
        resume_step: Step that the run continues from, or None for a fresh start.

    Returns:
        The sinks, for `MetricsLogger`.

    Raises:
        ConfigError: `wandb_mode` is unknown, or a package or login is missing.
    """
    sinks: list[MetricsSink] = []
    if wandb_mode in ("offline", "online"):
        mode = cast(WandbMode, wandb_mode)
        run_name = wandb_run_name or run_dir.resolve().name
        sinks.append(
            WandbSink(wandb_project, run_name, mode, run_dir, config or {}, run_id=wandb_run_id)
        )
    elif wandb_mode != "off":
        raise ConfigError(
            f"reporting.wandb={wandb_mode} is not a mode: use off, offline or online."
        )
    if tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step=resume_step))
    return sinks


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
