"""A sweep through its command line: stopped, killed, shared by two processes, and failing."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from commands import REPO, TIMEOUT_SECONDS, Process, Result
from pyarrow import parquet
from threads import TEST_THREADS

from megatron_mdm.checkpoint.retention import list_saved_steps
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.reporting.metrics import read_metrics
from megatron_mdm.studies.sweeps.run_states import read_attempt
from megatron_mdm.studies.sweeps.sweep_command import COMMANDS

pytestmark = pytest.mark.slow

# Long enough to be hit in their midst; a pass is 16 steps.
NUM_STEPS, SAVE_STEPS, SEQ, BATCH = 128, 16, 32, 4
NAMES = ["ar_seed-0", "ar_seed-1", "mdm_seed-0", "mdm_seed-1"]
# What depends on the moment and on the machine.
TIMES = {"seconds"}


def write_shards(prefix: Path, seed: int, num_tokens: int) -> str:
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add_document(np.random.default_rng(seed).integers(0, 99, num_tokens))
        writer.finish()
    return str(prefix)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    tree = {
        "run": {"dir": "unset", "device": "cpu", "num_threads": TEST_THREADS},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": 100,
        },
        "objective": {"process": {"masking": "fixed_count"}},
        "data": {
            "train": [{"path": write_shards(root / "train", 0, 64 * SEQ)}],
            "valid": [{"path": write_shards(root / "valid", 1, 8 * SEQ)}],
            "seq_length": SEQ,
        },
        "batch": {"micro_batch_size": 2, "global_batch_size": BATCH},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
        "schedule": {"steps": NUM_STEPS},
        "validation": {"every_steps": 64, "num_samples": 8},
        "checkpoint": {"every_steps": SAVE_STEPS},
        "reporting": {"peak_tflops": 0.1},
    }
    path = root / "base.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_sweep(base: Path, folder: Path, **sections) -> Path:
    folder.mkdir()
    path = folder / "sweep.yaml"
    tree = {"base": str(base), "dir": str(folder / "runs"), **sections}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def four_runs(base: Path, folder: Path) -> Path:
    kinds = [{"objective.kind": "ar"}, {"objective.kind": "mdm"}]
    return write_sweep(base, folder, axes={"objective": kinds, "run.seed": [0, 1]})


def start(file: Path, *options: object) -> Process:
    return Process(["tools/sweep.py", "run", file, *options], None, REPO)


def tell(command: str, file: Path, *options: object) -> str:
    """What a command prints that starts no run; in this process, as its own takes seconds."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_command(COMMANDS, "", [command, str(file), *map(str, options)]) is None
    return printed.getvalue()


def wait(process: Process) -> Result:
    # A sweep is several runs.
    return process.wait(time.monotonic() + 2 * TIMEOUT_SECONDS)


def table_of(file: Path, ending: str) -> list[dict]:
    path = file.parent / f"table{ending}"
    tell("table", file, "--out", path)
    if ending == ".parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def curve(folder: Path) -> list[tuple]:
    """What a run computed, step by step; not when, nor how fast."""
    return [
        tuple((name, value) for name, value in record.items() if not name.startswith("perf/"))
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def until_saved(folder: Path, earlier: int = -1) -> int:
    """Waits for a checkpoint, and returns the number of the process that trains."""
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while max(list_saved_steps(folder / "checkpoints"), default=-1) <= earlier:
        assert time.monotonic() < deadline, f"{folder} saves nothing"
        time.sleep(0.01)
    return json.loads((folder / "ranks/rank-0.json").read_text("utf-8"))["pid"]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory) -> Path:
    """The file of a sweep that was left alone."""
    file = four_runs(base, tmp_path_factory.mktemp("whole") / "sweep")
    result = wait(start(file, "--jobs", 2)).succeeded()
    assert "all done" in result.output
    return file


def test_the_table_says_what_the_runs_came_to(uninterrupted):
    rows = table_of(uninterrupted, ".parquet")
    assert [row["run"] for row in rows] == NAMES
    for row in rows:
        records = read_metrics(uninterrupted.parent / "runs" / row["run"] / "metrics.jsonl")
        valid = [one for one in records if "valid/nll_nats_per_token" in one]
        # What AR and MDM both predict: with AR the same as all.
        losses = [one["valid/nll_given_first_nats_per_token"] for one in valid]
        assert [one["step"] for one in valid] == [64, 128]
        assert row["status"] == "done"
        assert row["loss"] == losses[-1]
        error = valid[-1]["valid/nll_given_first_standard_error"]
        assert row["loss_standard_error"] == error > 0
        assert row["best_loss"] == min(losses)
        assert row["best_step"] == [64, 128][losses.index(min(losses))]
        assert row["best_tokens"] == row["best_step"] * BATCH * SEQ
        # 128 steps of 4 windows, 64 windows per pass.
        assert (row["num_tokens"], row["unique_tokens"], row["epochs"]) == (16384, 2048, 8.0)
        # 2 layers of 4 * 32^2 + 3 * 32 * 64 + 2 * 32, and the last norm.
        assert row["num_parameters"] == 2 * (4096 + 6144 + 64) + 32
        assert row["flops"] == 6 * row["num_parameters"] * 16384
        logged = [one for one in records if "train/loss_nats_per_token" in one]
        losses = [one["train/loss_nats_per_token"] for one in logged if one["epoch"] > 7]
        assert len(losses) == 16
        assert row["train_loss"] == pytest.approx(sum(losses) / 16, rel=1e-12)
        assert row["learning_rate"] == 3e-3
        assert row["seconds"] > 0
        assert row["objective"] == row["objective.kind"] == row["run"][: -len("_seed-0")]
        assert row["seed"] == row["run.seed"] == int(row["run"][-1])
    written = table_of(uninterrupted, ".csv")
    assert [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ] == written


def test_what_is_done_is_not_run_again(uninterrupted):
    folders = [uninterrupted.parent / "runs" / name for name in NAMES]
    before = [read_attempt(folder) for folder in folders]
    result = wait(start(uninterrupted)).succeeded()
    assert "started" not in result.output
    assert [read_attempt(folder) for folder in folders] == before
    assert "4 done" in tell("status", uninterrupted)


def test_stopped_killed_and_shared_it_ends_with_the_same_table(uninterrupted, base, tmp_path):
    file = four_runs(base, tmp_path / "sweep")
    folders = [tmp_path / "sweep/runs" / name for name in NAMES]

    # Asked to stop, its runs save and stop.
    first = start(file, "--jobs", 2)
    pid = until_saved(folders[0])
    psutil.Process(psutil.Process(pid).ppid()).send_signal(signal.SIGTERM)
    result = wait(first)
    assert result.status == 75, result.output
    assert (folders[0] / "stopped").exists()
    # Beside a run that saved late on a busy machine, the other may have ended and a third begun.
    assert re.search(r"\d stopped, [12] waiting", tell("status", file))

    # Killed with all its runs, in the midst of them.
    second = start(file, "--jobs", 2)
    pid = until_saved(folders[0], earlier=max(list_saved_steps(folders[0] / "checkpoints")))
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    assert wait(second).status == -signal.SIGKILL
    # Locks last until the kernel has cleared the processes away.
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while "running" in (status := tell("status", file)):
        assert time.monotonic() < deadline, status
    assert "killed" in status
    num_done = int(found[1]) if (found := re.search(r"(\d) done", status)) else 0

    # Two at once finish it, and no run is trained by both.
    both = [start(file, "--jobs", 1) for _ in range(2)]
    results = [wait(process) for process in both]
    outputs = "".join(result.output for result in results)
    # Some may have ended before they were killed; the table says that they are done.
    started = [outputs.count(f"{name}: started") for name in NAMES]
    assert max(started) == 1, outputs
    assert sum(started) == len(NAMES) - num_done, outputs
    for name, count in zip(NAMES, started, strict=True):
        assert outputs.count(f"{name}: done") >= count, outputs
    assert "is in use by another run" not in outputs

    found, expected = (table_of(one, ".parquet") for one in (file, uninterrupted))
    for row in (*found, *expected):
        for name in TIMES:
            row.pop(name)
    assert found == expected
    for name in NAMES:
        left, right = (one.parent / "runs" / name for one in (file, uninterrupted))
        assert curve(left) == curve(right)
        assert "other conditions" not in (left / "console.log").read_text()


def test_a_failed_run_is_shown_and_does_not_stop_the_others(base, tmp_path):
    file = write_sweep(
        base,
        tmp_path / "sweep",
        set={"faults.max_skipped_steps": 2, "schedule.steps": 4, "validation.every_steps": None},
        axes={"rate": {"bad": {"optimizer.lr": 1e30}, "good": {"optimizer.lr": 1e-3}}},
    )
    result = wait(start(file))
    assert result.status == 1
    assert "good: done" in result.output
    assert "1 of 2 runs are not done:" in result.output
    (line,) = {line for line in result.output.splitlines() if "  bad: failed" in line}
    assert "The last 2 steps up to step" in line
    status = tell("status", file)
    assert "1 done, 1 failed" in status
    assert "faults.max_skipped_steps=2" in status
    assert [row["status"] for row in table_of(file, ".csv")] == ["failed", "done"]

    # The same folder for another run: refused before anything starts.
    file.write_text(file.read_text().replace("schedule.steps: 4", "schedule.steps: 5"))
    refused = wait(start(file))
    assert refused.status == 2
    (line,) = refused.error_lines
    assert "runs/bad holds a run with schedule.steps=4, where the sweep has 5: " in line
    assert "started" not in refused.output
    for command in ("status", "table", "plan"):
        with pytest.raises(ConfigError, match=r"schedule\.steps=4, where the sweep has 5"):
            tell(command, file)
