"""The table of a sweep: one row a run, for fits and for any other program; CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import open_whole_file
from megatron_mdm.reporting.judged_windows import JudgedWindows, paired_difference
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.studies.sweeps.grid import Sweep, field_of
from megatron_mdm.studies.sweeps.run_sizes import SizedRun
from megatron_mdm.studies.sweeps.run_states import RunState

_NLL_ERROR = "valid/nll_standard_error"
_TRAIN = "train/loss_nats_per_token"
# Numbers that a run may lack, so that nothing tells Parquet their type where all do.
_FLOATS = (
    *("loss", "loss_standard_error", "best_loss", "best_loss_standard_error", "difference"),
    *("difference_standard_error", "difference_clustered_error", "train_loss", "seconds"),
)
_TYPES = dict.fromkeys(("best_step", "best_tokens"), pyarrow.int64())
_TYPES |= dict.fromkeys(_FLOATS, pyarrow.float64())

RunRow = dict[str, Any]


def build_rows(runs: Sequence[SizedRun], states: Mapping[str, RunState]) -> list[RunRow]:
    """Reads the folders of a sweep's runs.

    Args:
        runs: The runs.
        states: How far they are, by name.

    Returns:
        What each run came to, by name of the column, as docs/sweeps.md describes them. Held-out
        losses are nats per token over the tokens that AR and MDM both predict; a cell is None where
        nothing is known.

    Raises:
        DataError: A file of theirs is damaged.
    """
    pairs: list[tuple[RunRow, JudgedWindows | None]] = []
    for run in runs:
        left = RunFolder(run.folder)
        row = _row(run, left, states[run.name].status)
        pairs.append((row, left.windows.get(row["best_step"])))
    found = [(row["best_loss"], windows) for row, windows in pairs if windows is not None]
    if found:
        _, least = min(found, key=lambda one: one[0])
        for row, windows in pairs:
            row |= _difference(least, windows)
    return [row for row, _ in pairs]


def _difference(least: JudgedWindows, windows: JudgedWindows | None) -> RunRow:
    found = None if windows is None else paired_difference(least, windows)
    if found is None:
        return {}
    cells = {
        "difference": found.mean,
        "difference_standard_error": found.standard_error,
        "difference_clustered_error": found.clustered_error,
    }
    return {name: value if math.isfinite(value) else None for name, value in cells.items()}


def _row(run: SizedRun, left: RunFolder, status: str) -> RunRow:
    step, last, best = left.step, left.last_validation, left.best_validation or {}
    best_step = best.get("step")
    return {
        "run": run.name,
        "status": status,
        "objective": run.config.objective.kind,
        "num_parameters": run.num_parameters,
        "num_parameters_with_embeddings": run.num_parameters_with_embeddings,
        "total_parameters": run.total_parameters,
        "num_tokens": run.num_tokens(step),
        "unique_tokens": run.unique_tokens,
        "epochs": run.epochs(step),
        "flops": run.flops(step),
        "flops_with_embeddings": run.flops_with_embeddings(step),
        "exact_flops": run.exact_flops(step),
        "loss": last.get(NLL),
        "loss_standard_error": last.get(_NLL_ERROR),
        "best_loss": best.get(NLL),
        "best_loss_standard_error": best.get(_NLL_ERROR),
        "difference": None,
        "difference_standard_error": None,
        "difference_clustered_error": None,
        "best_step": best_step,
        "best_tokens": None if best_step is None else run.num_tokens(best_step),
        "train_loss": _last_epoch_loss(left.records, run),
        "learning_rate": run.config.optimizer.lr,
        "seed": run.config.run.seed,
        "seconds": left.run_info.get("wall_seconds"),
    }


def write_table(path: Path, sweep: Sweep, rows: Sequence[RunRow]) -> None:
    """Writes the table, whole or not at all.

    Args:
        path: What to write; .csv or .parquet says how. Its folder is made when absent.
        sweep: Its swept fields become columns after those of `rows`, under their dotted names;
            lists and sections are JSON.
        rows: One for each of its runs.

    Raises:
        ConfigError: The ending is another one.
    """
    check_table_path(path)
    configs = {run.name: run.config for run in sweep.runs}
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    for field in sweep.fields:
        columns[field] = [_cell(field_of(configs[row["run"]], field)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole_file(path) as stream:
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
    # All others have the type that their values have.
    table = pyarrow.table(
        {name: pyarrow.array(values, _TYPES.get(name)) for name, values in columns.items()}
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
