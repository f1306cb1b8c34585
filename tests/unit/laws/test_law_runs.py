"""Reading of tables of runs: what is taken, left out, and refused."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.runs import Runs, read_runs

HEADER = "run,status,objective,num_parameters,num_tokens,unique_tokens,loss\n"
ROWS = "a,done,mdm,1e6,1e8,5e7,3.5\nb,done,mdm,2e6,1e8,5e7,3.25\n"


def table_of(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_finished_runs_are_taken_and_the_others_counted(tmp_path):
    more = "c,running,mdm,1e6,1e8,5e7,\nd,failed,mdm,1e6,1e8,5e7,nan\ne,running,mdm,1,1,1,1\n"
    table = read_runs(table_of(tmp_path, HEADER + ROWS + more))
    assert table.names == ("a", "b")
    assert table.runs.losses.tolist() == [3.5, 3.25]
    assert table.runs.flops.tolist() == [6e14, 1.2e15]
    assert table.runs.epochs.tolist() == [2, 2]
    assert table.left_out == {"status running": 2, "status failed": 1}


def test_parquet_reads_as_csv_does(tmp_path):
    names = HEADER.strip().split(",")
    columns = list(zip(*(row.split(",") for row in ROWS.strip().split("\n")), strict=True))
    typed = [list(map(float, column)) if "1" in column[0] or "." in column[0] or "e7" in column[0]
             else list(column) for column in columns]  # fmt: skip
    pq.write_table(pa.table(dict(zip(names, typed, strict=True))), tmp_path / "runs.parquet")
    table = read_runs(tmp_path / "runs.parquet")
    assert table.names == ("a", "b")
    assert table.runs.losses.tolist() == [3.5, 3.25]


def test_objectives_are_not_mixed(tmp_path):
    path = table_of(tmp_path, HEADER + ROWS + "c,done,ar,1e6,1e8,5e7,3.0\n")
    with pytest.raises(DataError, match=r"several objectives \(ar, mdm\).*--objective"):
        read_runs(path)
    table = read_runs(path, objective="ar")
    assert table.runs.losses.tolist() == [3.0]
    assert table.left_out == {"objective mdm": 2}


def test_columns_may_have_other_names(tmp_path):
    path = table_of(tmp_path, HEADER.replace("loss", "best_loss") + ROWS)
    with pytest.raises(DataError, match=r"no column loss .*say which .*--column loss=NAME"):
        read_runs(path)
    assert len(read_runs(path, columns={"loss": "best_loss"}).runs) == 2
    with pytest.raises(DataError, match="speed is no quantity of a run"):
        read_runs(path, columns={"speed": "loss"})


def test_which_n_a_table_holds_is_known_from_the_column_or_said(tmp_path):
    both = HEADER.replace("num_parameters", "num_parameters,num_parameters_with_embeddings")
    path = table_of(tmp_path, both + "a,done,mdm,1e6,3e6,1e8,5e7,3.5\n")
    for asked, size, counted in (
        (None, 1e6, "without_embeddings"),
        ("without_embeddings", 1e6, "without_embeddings"),
        ("with_embeddings", 3e6, "with_embeddings"),
    ):
        table = read_runs(path, parameters=asked)
        assert (table.runs.num_parameters.tolist(), table.parameters) == ([size], counted)
    # Of a foreign column nobody knows.
    foreign = table_of(tmp_path, HEADER.replace("num_parameters", "N") + ROWS)
    columns = {"num_parameters": "N"}
    assert read_runs(foreign, columns=columns).parameters is None
    told = read_runs(foreign, columns=columns, parameters="with_embeddings")
    assert (told.runs.num_parameters.tolist(), told.parameters) == ([1e6, 2e6], "with_embeddings")
    # A table of before has one count only.
    old = table_of(tmp_path, HEADER + ROWS)
    with pytest.raises(DataError, match="no column num_parameters_with_embeddings"):
        read_runs(old, parameters="with_embeddings")


@pytest.mark.parametrize("bad", ["nan", "inf", "-1.5", "0", "", "diverged"])
def test_a_finished_run_without_a_usable_loss_is_named(tmp_path, bad):
    path = table_of(tmp_path, HEADER + ROWS + f"c,done,mdm,1e6,1e8,5e7,{bad}\n")
    shown = bad or "empty"
    with pytest.raises(DataError, match=rf"row 4 \(c\): loss is {shown}, .*\(--skip-failed\)"):
        read_runs(path)
    table = read_runs(path, skip_failed=True)
    assert len(table.runs) == 2
    assert table.left_out == {"without a usable loss": 1}


def test_bad_sizes_are_refused_even_where_failed_runs_are_skipped(tmp_path):
    path = table_of(tmp_path, HEADER + ROWS + "c,done,mdm,0,1e8,5e7,3.5\n")
    with pytest.raises(DataError, match=r"row 4 \(c\): num_parameters is 0"):
        read_runs(path, skip_failed=True)


def test_tables_that_hold_nothing_are_refused(tmp_path):
    path = table_of(tmp_path, HEADER + "c,failed,mdm,1,1,1,1\n")
    with pytest.raises(DataError, match=r"no finished run \(1 status failed\)"):
        read_runs(path)
    with pytest.raises(DataError, match=r"no finished run \(no rows\)"):
        read_runs(table_of(tmp_path, HEADER))
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "none.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_runs(tmp_path / "none.parquet")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_numbers_given_directly_are_checked_too(bad):
    losses = np.array([3.0, bad, 2.0])
    ones = np.ones(3)
    with pytest.raises(DataError, match=f"losses of run 1 is {bad}"):
        Runs(ones, ones, ones, losses)
