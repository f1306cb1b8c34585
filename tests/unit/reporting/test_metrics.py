from __future__ import annotations

import errno
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting.metrics import (
    MetricsLogger,
    find_best_validation,
    read_metrics,
    read_validations,
)


class _RecordingSink:
    def __init__(self):
        self.logged = []
        self.num_closes = 0

    def log(self, record, step):
        self.logged.append((step, dict(record)))

    def close(self):
        self.num_closes += 1


def _records_of(step):
    yield {"step": step, "train/loss_nats_per_token": 10 / step, "train/lr": 3e-4}
    if step % 3 == 0:
        yield {"step": step, "valid/nll_nats_per_token": 11 / step}


def _train(run_dir, first_step, last_step, resume_step):
    logger = MetricsLogger(run_dir, resume_step=resume_step)
    for step in range(first_step, last_step + 1):
        for record in _records_of(step):
            logger.log(record)
    logger.close()


@settings(max_examples=60, deadline=None)
@given(
    killed_at=st.integers(1, 9),
    checkpoint_age=st.integers(0, 9),
    num_bytes_lost=st.integers(0, 30),
)
def test_resumed_run_leaves_the_file_of_an_uninterrupted_run(
    killed_at, checkpoint_age, num_bytes_lost
):
    with tempfile.TemporaryDirectory() as directory:
        whole, resumed = Path(directory, "whole"), Path(directory, "resumed")
        _train(whole, 1, 9, None)
        _train(resumed, 1, killed_at, None)
        path = resumed / "metrics.jsonl"
        # Shorter than the last line: a kill loses no more than a part of that.
        path.write_bytes(path.read_bytes() + b'{"step": 10, "train/loss_nats'[:num_bytes_lost])
        resume_step = max(0, killed_at - checkpoint_age)
        _train(resumed, resume_step + 1, 9, resume_step)
        assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


@settings(deadline=None)
@given(num_bytes=st.integers(0, 10_000))
def test_reader_gives_a_prefix_wherever_the_file_is_cut(num_bytes):
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        _train(run_dir, 1, 6, None)
        path = run_dir / "metrics.jsonl"
        whole, content = read_metrics(path), path.read_bytes()
        num_bytes %= len(content) + 1
        path.write_bytes(content[:num_bytes])
        records = read_metrics(path)
        assert records == whole[: len(records)]
        assert len(records) >= content[:num_bytes].count(b"\n")


def test_line_that_lost_only_its_newline_is_kept_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    _train(tmp_path, 4, 4, 3)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 4]


def test_resume_without_a_file_starts_one(tmp_path):
    _train(tmp_path / "new", 5, 5, 4)
    assert [record["step"] for record in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [5]


def test_resume_leaves_no_temporary_file(tmp_path):
    _train(tmp_path, 1, 3, None)
    _train(tmp_path, 3, 3, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "validations.jsonl"}


def test_fresh_start_keeps_every_older_file(tmp_path):
    for last_step in (1, 2, 4):
        _train(tmp_path, last_step, last_step, None)
    steps = {path.name: read_metrics(path)[0]["step"] for path in tmp_path.glob("metrics*")}
    assert steps == {"metrics.jsonl.1": 1, "metrics.jsonl.2": 2, "metrics.jsonl": 4}


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    logger = MetricsLogger(tmp_path, resume_step=None)
    for step in range(1, 4):
        logger.log({"step": step})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step
    logger.close()


def test_non_finite_numbers_survive_in_valid_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": "text"}
    logger = MetricsLogger(tmp_path, resume_step=None)
    logger.log({"step": 1, **values})
    logger.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "metrics.jsonl"
    stored = json.loads(path.read_text(), parse_constant=refuse)
    assert [stored[name] for name in "abc"] == ["nan", "inf", "-inf"]
    (record,) = read_metrics(path)
    assert math.isnan(record.pop("a"))
    assert record == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1, "e": "text"}


@pytest.mark.parametrize("record", [{"loss": 1.0}, {"step": 1.5}, {"step": 1, "note": "nan"}])
def test_record_that_could_not_be_read_back_is_refused(tmp_path, record):
    logger = MetricsLogger(tmp_path, resume_step=None)
    with pytest.raises(ValueError, match="record"):
        logger.log(record)
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("bad_line", ["{", "", "[1]", '{"loss": 1}', "\udcff"])
def test_damaged_line_is_named_by_reader_and_resume(tmp_path, bad_line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{bad_line}\n{{"step": 3}}\n'.encode(errors="surrogateescape")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 "):
        read_metrics(path)
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 "):
        MetricsLogger(tmp_path, resume_step=1)
    assert path.read_bytes() == content


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_sinks_get_every_record_and_close_once(tmp_path):
    sink = _RecordingSink()
    logger = MetricsLogger(tmp_path, resume_step=None, sinks=[sink])
    logger.log({"step": 7, "train/lr": 1.0})
    logger.close()
    logger.close()
    assert sink.logged == [(7, {"step": 7, "train/lr": 1.0})]
    assert sink.num_closes == 1


class _FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, path, free_bytes):
        self._file, self.free_bytes = path.open("ab", buffering=0), free_bytes

    def write(self, content):
        taken = min(self.free_bytes, len(content))
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.free_bytes -= taken
        return self._file.write(content[:taken])

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_what_a_full_disk_refuses_is_written_later(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsLogger(tmp_path, resume_step=None)
    logger.log({"step": 1})
    logger._metrics._file = disk = _FullDisk(path, 7)
    for step in (2, 3, 4):
        logger.log({"step": step})
    assert [record["step"] for record in read_metrics(path)] == [1]
    assert path.read_bytes().endswith(b"\n")
    assert logger.num_unwritten == 3
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert "metrics.jsonl cannot be written (No space left on device): the run goes on" in said
    disk.free_bytes = 10**6
    logger.log({"step": 5})
    logger.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert logger.num_unwritten == 0


class _FailingSink(_RecordingSink):
    def log(self, record, step):
        super().log(record, step)
        raise RuntimeError("the network is gone")


def test_a_sink_that_fails_is_left_out(tmp_path, capsys):
    failing, good = _FailingSink(), _RecordingSink()
    logger = MetricsLogger(tmp_path, resume_step=None, sinks=[failing, good])
    for step in (1, 2):
        logger.log({"step": step})
    logger.close()
    assert (len(failing.logged), len(good.logged)) == (1, 2)
    said = "warning: _FailingSink failed (the network is gone) and gets nothing more of this run."
    assert capsys.readouterr().err.splitlines() == [said]


def _validation(step, nll, **more):
    return {"step": step, "valid/nll_nats_per_token": nll, "valid/noise_seed": 0, **more}


def test_the_best_validation_is_the_earliest_of_the_lowest_that_are_finite(tmp_path):
    assert find_best_validation([]) is None
    assert find_best_validation([{"step": 1}, _validation(2, math.nan)]) is None
    values = {2: 4.0, 4: 3.0, 6: math.nan, 8: 3.0, 10: -math.inf}
    records = [{"step": 1, "train/lr": 1.0}, *(_validation(*pair) for pair in values.items())]
    assert find_best_validation(records)["step"] == 4
    logger = MetricsLogger(tmp_path, resume_step=None)
    for record in records:
        logger.log(record)
    logger.close()
    stored = read_validations(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in stored] == list(values)
    assert find_best_validation(stored)["step"] == 4


def test_the_best_validation_is_one_on_the_windows_and_noise_of_the_last():
    records = [_validation(2, 3.0), _validation(4, 5.0, **{"valid/noise_seed": 1})]
    records.append(_validation(6, 6.0, **{"valid/noise_seed": 1}))
    assert find_best_validation(records)["step"] == 4
