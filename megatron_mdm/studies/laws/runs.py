"""Finished runs: what laws are fitted to, and how they are read from a table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from megatron_mdm.config import ParameterConvention
from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.forms import Array, Law

QUANTITIES = ("num_parameters", "num_tokens", "unique_tokens", "loss")
# What one column may be called otherwise. The last three need not be there.
COLUMNS = (*QUANTITIES, "run", "status", "objective")
# N in the tables of sweeps.
_OWN_COLUMNS: dict[ParameterConvention, str] = {
    "without_embeddings": "num_parameters",
    "with_embeddings": "num_parameters_with_embeddings",
}
# Two values nearer than this are one: sizes are rounded in tables.
_SAME = 0.01
# A run counts as repeating its data from here on.
REPEATS = 1.01


@dataclass(frozen=True)
class Runs:
    """Finished runs, one per row.

    Attributes:
        num_parameters: float64 [R], N, all counted alike.
        num_tokens: float64 [R], tokens trained on, D.
        unique_tokens: float64 [R], how many of them differ, U.
        losses: float64 [R], held-out loss, nats per token.

    Raises:
        DataError: Numbers are not positive and finite, or the lengths differ.
    """

    num_parameters: Array
    num_tokens: Array
    unique_tokens: Array
    losses: Array

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            wrong = ~(np.isfinite(values) & (values > 0))
            if values.shape != self.losses.shape or wrong.any():
                row = int(wrong.argmax()) if wrong.any() else len(values)
                found = f"{float(values[row])}" if wrong.any() else f"{len(values)} rows"
                raise DataError(
                    f"{field.name} of run {row} is {found}: every run needs a positive, finite "
                    "number of each; leave out runs that failed."
                )

    def __len__(self) -> int:
        return len(self.losses)

    def take(self, rows: NDArray[np.int64]) -> Runs:
        """Some of the runs, in the order given; one may come several times."""
        return Runs(*(getattr(self, field.name)[rows] for field in fields(self)))

    def losses_of(self, law: Law) -> Array:
        """What a law expects of the runs, float64 [R], nats per token."""
        return law.loss(
            num_parameters=self.num_parameters,
            num_tokens=self.num_tokens,
            unique_tokens=self.unique_tokens,
        )

    @property
    def flops(self) -> Array:
        """float64 [R], 6 N D."""
        return 6 * self.num_parameters * self.num_tokens

    @property
    def epochs(self) -> Array:
        """float64 [R], D / U, at least 1."""
        return np.maximum(self.num_tokens / self.unique_tokens, 1.0)


@dataclass(frozen=True)
class RunsTable:
    """What was read of a table.

    Attributes:
        runs: The runs to fit.
        names: Of each run; `row 2` and so on, as a text editor counts, where there is no column.
        left_out: How many rows were left out, for each reason.
        parameters: Which N the runs have; None where neither the table nor the user says.
        objective: What all of them learn; None where neither says.
    """

    runs: Runs
    names: tuple[str, ...]
    left_out: Mapping[str, int]
    parameters: ParameterConvention | None
    objective: str | None = None


def read_runs(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    objective: str | None = None,
    skip_failed: bool = False,
    parameters: ParameterConvention | None = None,
) -> RunsTable:
    """Reads finished runs from a table, one per row.

    Args:
        path: CSV with a line of names, or Parquet.
        columns: For names of `COLUMNS`, what they are called in the table, where otherwise.
        objective: `mdm` or `ar`: other rows are left out, if the table tells them apart.
        skip_failed: Leave out, instead of refusing, runs without a positive, finite loss.
        parameters: Which N to take of the two columns of a sweep's table, or which one a column of
            another name holds.

    Returns:
        The runs whose status is `done`, or all where there is no such column.

    Raises:
        DataError: The file cannot be read, lacks a column, mixes objectives, or holds a number that
            is not positive and finite.
    """
    names = {column: column for column in COLUMNS} | dict(columns or {})
    if parameters is not None and "num_parameters" not in (columns or {}):
        names["num_parameters"] = _OWN_COLUMNS[parameters]
    unknown = set(names) - set(COLUMNS)
    if unknown:
        raise DataError(
            f"{min(unknown)} is no quantity of a run: the columns to name are {', '.join(COLUMNS)}."
        )
    rows = _read_rows(path)
    learned = _check_columns(path, rows, names, columns or {}, objective)
    left_out: Counter[str] = Counter()
    kept: list[list[float]] = []
    labels = []
    for number, row in enumerate(rows, start=2):
        label = str(row.get(names["run"]) or f"row {number}")
        status = row.get(names["status"]) or "done"
        if str(status) != "done":
            left_out[f"status {status}"] += 1
        elif objective is not None and str(row.get(names["objective"], objective)) != objective:
            left_out[f"objective {row.get(names['objective'])}"] += 1
        else:
            place = f"{path}, row {number} ({label})" if label != f"row {number}" else label
            numbers = _numbers_of(row, names, place, skip_failed)
            if numbers is None:
                left_out["without a usable loss"] += 1
            else:
                kept.append(numbers)
                labels.append(label)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no rows"
        raise DataError(f"{path} holds no finished run ({reasons}): finish some, or give another.")
    runs = Runs(*np.array(kept, dtype=np.float64).T)
    # A column of another name holds what the user says; of these two the name says it.
    told = {name: convention for convention, name in _OWN_COLUMNS.items()}
    counted = parameters or told.get(names["num_parameters"])
    return RunsTable(runs, tuple(labels), left_out, counted, learned)


def check_identifiable(
    runs: Runs, form: type[Law], fitted: Sequence[str], tie_exponents: bool = False
) -> None:
    """Refuses runs that cannot tell the constants apart, however exact their losses are.

    Args:
        runs: What is to be fitted.
        form: The form.
        fitted: Constants to be fitted.
        tie_exponents: Whether alpha = beta.

    Raises:
        DataError: There are too few runs, or sizes, tokens or repetitions vary too little.
    """
    num_free = len(fitted) - (tie_exponents and "token_exponent" in fitted)
    if len(runs) <= num_free:
        raise DataError(
            f"{len(runs)} runs are too few to fit {num_free} constants: give at least "
            f"{num_free + 1}, better three times as many."
        )
    sizes, tokens = num_distinct(runs.num_parameters), num_distinct(runs.num_tokens)
    if form.minds_repetition():
        # What tokens are worth also varies with how many of them are new.
        tokens = max(tokens, num_distinct(np.minimum(runs.unique_tokens, runs.num_tokens)))
    # Of a tied exponent one side can tell; the other needs its scale alone.
    tied_elsewhere = {"parameter_exponent" if tokens > sizes else "token_exponent"}
    for what, column, found, constants in (
        ("sizes (num_parameters)", "N", sizes, ("parameter_scale", "parameter_exponent")),
        ("numbers of tokens (num_tokens)", "D", tokens, ("token_scale", "token_exponent")),
    ):
        wanted = [
            name
            for name in constants
            if name in fitted and not (tie_exponents and name in tied_elsewhere)
        ]
        if found < 1 + len(wanted):
            raise DataError(
                f"The runs have {found} different {what}, too few to tell {' and '.join(wanted)} "
                f"from the irreducible loss: vary {column} over at least {1 + len(wanted)} values, "
                "or hold constants (--hold)."
            )
    _check_repetition(runs, form, fitted)


def _check_repetition(runs: Runs, form: type[Law], fitted: Sequence[str]) -> None:
    """Refuses runs that cannot tell what repetition is worth or costs."""
    repeats = runs.epochs > REPEATS
    told = [name for name in (*form.reuse_names[:1], *form.penalty_names) if name in fitted]
    if told and not repeats.any():
        raise DataError(
            f"No run repeats its data (num_tokens above unique_tokens), so {told[0]} cannot "
            "be known: add runs of several epochs, or fit the form chinchilla."
        )
    if not form.penalty_names:
        return
    scale, capacity, exponent = form.penalty_names
    ratios = runs.num_parameters / runs.unique_tokens
    for name, what, found, wanted in (
        (exponent, "numbers of epochs above one", runs.epochs[repeats], 1 + (scale in fitted)),
        (capacity, "parameters per unique token", ratios[repeats], 1 + (scale in fitted)),
    ):
        if name in fitted and num_distinct(found) < wanted:
            raise DataError(
                f"The runs that repeat their data have {num_distinct(found)} different {what}, too "
                f"few to tell {name} from {scale}: vary them over at least {wanted} values, or "
                "hold constants (--hold)."
            )


def num_distinct(values: Array) -> int:
    """Counts values that differ by more than a hundredth from their neighbours.

    Args:
        values: float64 [R], positive.

    Returns:
        At least 1.
    """
    return 1 + int((np.diff(np.log(np.sort(values))) > _SAME).sum())


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            return [dict(row) for row in table.to_pylist()]
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return [dict(row) for row in csv.DictReader(stream)]
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as a table: {reason}.") from error


def _check_columns(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    asked: Mapping[str, str],
    objective: str | None,
) -> str | None:
    """Names the first column that is needed and not there; gives the objective of the runs."""
    present = rows[0].keys() if rows else ()
    for column in (*QUANTITIES, *asked):
        if rows and names[column] not in present:
            raise DataError(
                f"{path} has no column {names[column]} (it has {', '.join(map(str, present))}): "
                f"say which one holds it with --column {column}=NAME."
            )
    kinds = {str(row[names["objective"]]) for row in rows if row.get(names["objective"])}
    if objective is None and len(kinds) > 1:
        raise DataError(
            f"{path} holds runs of several objectives ({', '.join(sorted(kinds))}), which follow "
            "laws of their own: choose one with --objective."
        )
    return objective or next(iter(kinds), None)


def _numbers_of(
    row: Mapping[str, Any], names: Mapping[str, str], place: str, skip_failed: bool
) -> list[float] | None:
    """Reads the four numbers of a row, or None where it has failed and may be skipped."""
    numbers = []
    for quantity in QUANTITIES:
        text = row[names[quantity]]
        try:
            number = float(text)
        except (TypeError, ValueError):
            number = float("nan")
        if not 0 < number < float("inf"):
            if quantity == "loss" and skip_failed:
                return None
            remedy = " or leave it out (--skip-failed)" if quantity == "loss" else ""
            shown = "empty" if text in (None, "") else text
            raise DataError(
                f"{place}: {names[quantity]} is {shown}, not a positive, finite number: correct "
                f"it{remedy}."
            )
        numbers.append(number)
    return numbers
