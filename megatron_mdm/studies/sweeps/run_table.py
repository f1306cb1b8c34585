"""The table of a sweep: one row a run, for fits and for any other program; CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import whole_file
from megatron_mdm.reporting.judged_windows import JudgedWindows, paired_difference
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.studies.sweeps.grid import Sweep, field_of
from megatron_mdm.studies.sweeps.run_sizes import SizedRun
from megatron_mdm.studies.sweeps.run_states import RunState

_NLL_ERROR = "valid/nll_standard_error"
_TRAIN = "train/loss_nats_per_token"
_ARROW_TYPES = {
    "str": pyarrow.string(),
    "int": pyarrow.int64(),
    "int | None": pyarrow.int64(),
    "float": pyarrow.float64(),
    "float | None": pyarrow.float64(),
}


@dataclass(frozen=True)
class RunRow:
    """What a run came to; a cell is empty (None) where nothing is known.

    Held-out losses are nats per token over the tokens that AR and MDM both predict.

    Attributes:
        run: Its name.
        status: done, running, stopped, waiting or failed.
        objective: mdm or ar.
        num_parameters: N, without embeddings.
        num_parameters_with_embeddings: N as the data-constrained family counts it.
        total_parameters: All that is trained.
        num_tokens: D: tokens trained on so far.
        unique_tokens: U: distinct tokens of the training windows.
        epochs: D / U.
        flops: 6 N D, N without embeddings.
        flops_with_embeddings: 6 N D, N with them.
        exact_flops: All matrix products.
        loss: Last held-out loss.
        loss_standard_error: Of it.
        best_loss: Least held-out loss.
        best_loss_standard_error: Of it.
        difference: Least held-out loss, less that of the sweep's best run, window by window.
        difference_standard_error: Of it, as if windows were independent.
        difference_clustered_error: Of it, with windows of one document taken together.
        best_step: Optimizer step at which it was measured.
        best_tokens: D at that step.
        train_loss: Mean of the logged losses of the last epoch.
        learning_rate: Peak.
        seed: Of the run.
        seconds: Wall time; attempts that were killed are not in it.
    """

    run: str
    status: str
    objective: str
    num_parameters: int
    num_parameters_with_embeddings: int
    total_parameters: int
    num_tokens: int
    unique_tokens: int
    epochs: float
    flops: float
    flops_with_embeddings: float
    exact_flops: float
    loss: float | None
    loss_standard_error: float | None
    best_loss: float | None
    best_loss_standard_error: float | None
    difference: float | None
    difference_standard_error: float | None
    difference_clustered_error: float | None
    best_step: int | None
    best_tokens: int | None
    train_loss: float | None
    learning_rate: float
    seed: int
    seconds: float | None


def build_rows(runs: Sequence[SizedRun], states: Mapping[str, RunState]) -> list[RunRow]:
    """Reads the folders of a sweep's runs.

    Args:
        runs: The runs.
        states: How far they are, by name.

    Returns:
        A row for each.

    Raises:
        DataError: A file of theirs is damaged.
    """
    rows, judged = [], []
    for run in runs:
        left = RunFolder(run.folder)
        row = _row(run, left, states[run.name].status)
        rows.append(row)
        judged.append(None if row.best_step is None else left.windows.get(row.best_step))
    least: JudgedWindows | None = None
    least_loss = math.inf
    for row, windows in zip(rows, judged, strict=True):
        if windows is not None and row.best_loss is not None and row.best_loss < least_loss:
            least, least_loss = windows, row.best_loss
    return [
        _with_difference(row, least, windows) for row, windows in zip(rows, judged, strict=True)
    ]


def _with_difference(
    row: RunRow, least: JudgedWindows | None, windows: JudgedWindows | None
) -> RunRow:
    found = None if least is None or windows is None else paired_difference(least, windows)
    if found is None:
        return row
    errors = [
        error if math.isfinite(error) else None
        for error in (found.standard_error, found.clustered_error)
    ]
    return replace(
        row,
        difference=found.mean,
        difference_standard_error=errors[0],
        difference_clustered_error=errors[1],
    )


def _row(run: SizedRun, left: RunFolder, status: str) -> RunRow:
    step, last, best = left.step, left.last_validation, left.best_validation or {}
    best_step = best.get("step")
    return RunRow(
        run=run.name,
        status=status,
        objective=run.config.objective.kind,
        num_parameters=run.num_parameters,
        num_parameters_with_embeddings=run.num_parameters_with_embeddings,
        total_parameters=run.total_parameters,
        num_tokens=run.num_tokens(step),
        unique_tokens=run.unique_tokens,
        epochs=run.epochs(step),
        flops=run.flops(step),
        flops_with_embeddings=run.flops_with_embeddings(step),
        exact_flops=run.exact_flops(step),
        loss=last.get(NLL),
        loss_standard_error=last.get(_NLL_ERROR),
        best_loss=best.get(NLL),
        best_loss_standard_error=best.get(_NLL_ERROR),
        difference=None,
        difference_standard_error=None,
        difference_clustered_error=None,
        best_step=best_step,
        best_tokens=None if best_step is None else run.num_tokens(best_step),
        train_loss=_last_epoch_loss(left.records, run),
        learning_rate=run.config.optimizer.lr,
        seed=run.config.run.seed,
        seconds=left.run_info.get("wall_seconds"),
    )


def write_table(path: Path, sweep: Sweep, rows: Sequence[RunRow]) -> None:
    """Writes the table, whole or not at all.

    Args:
        path: What to write; .csv or .parquet says how. Its folder is made when absent.
        sweep: Its swept fields become columns after those of `RunRow`, under their dotted names;
            lists and sections are JSON.
        rows: One for each of its runs.

    Raises:
        ConfigError: The ending is another one.
    """
    check_table_path(path)
    configs = {run.name: run.config for run in sweep.runs}
    records = [asdict(row) for row in rows]
    columns: dict[str, list[Any]] = {
        column.name: [record[column.name] for record in records] for column in fields(RunRow)
    }
    for field in sweep.fields:
        columns[field] = [_cell(field_of(configs[row.run], field)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        stream.write(_as_csv(columns) if path.suffix == ".csv" else _as_parquet(columns))


def check_table_path(path: Path) -> None:
    """Checks that a table can be written under a name.

    Raises:
        ConfigError: The name says neither CSV nor Parquet.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(
            f"--out={path} is neither a CSV nor a Parquet file: end it in .csv or .parquet."
        )


def _as_csv(columns: Mapping[str, list[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for values in zip(*columns.values(), strict=True):
        writer.writerow(
            str(value).lower() if isinstance(value, bool) else value for value in values
        )
    return text.getvalue().encode()


def _as_parquet(columns: Mapping[str, list[Any]]) -> bytes:
    types = {column.name: _ARROW_TYPES[str(column.type)] for column in fields(RunRow)}
    # Whatever is swept has the type that its values have.
    table = pyarrow.table(
        {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _last_epoch_loss(records: Sequence[Mapping[str, Any]], run: SizedRun) -> float | None:
    logged = [record for record in records if _TRAIN in record]
    if not logged:
        return None
    since = run.epochs(logged[-1]["step"]) - 1
    losses = [record[_TRAIN] for record in logged if run.epochs(record["step"]) > since]
    return float(sum(losses) / len(losses))
