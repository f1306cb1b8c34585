"""Faults that a run meets, provoked in real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from commands import (
    NUM_STEPS,
    REPO,
    TIMEOUT_SECONDS,
    Process,
    cores_of,
    environment_of_a_process,
    pretrain,
    run,
)

from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.reporting.metrics import read_metrics

pytestmark = pytest.mark.slow

# Long enough to be hit in its midst, and no lines that fill the pipe meanwhile.
LONG = ["schedule.steps=200000", "reporting.log_every_steps=5", "validation.every_steps=null"]

# As in a terminal's foreground, whatever started the tests.
HEARING_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

ONE_OF_TWO = """
import os, runpy, sys
rank, port = sys.argv[1:3]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
del sys.argv[:3]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(command, place=None) -> Process:
    return Process(command, None if place is None else cores_of(place), REPO)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_two(command) -> list[Process]:
    """Two ranks without a launcher: each one's exit status is seen, and nobody ends the other."""
    port = free_port()
    return [start(["-c", ONE_OF_TWO, rank, port, *command], place=rank) for rank in range(2)]


def ended(*processes: Process):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    return [process.wait(deadline) for process in processes]


def until_step(run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
        assert time.monotonic() < deadline, f"{run_dir} has not come to step {step}"
        time.sleep(0.05)


def pid_of(run_dir: Path, rank: int) -> int:
    return json.loads((run_dir / "ranks" / f"rank-{rank}.json").read_text("utf-8"))["pid"]


def error_lines(results) -> list[str]:
    return [line for result in results for line in result.error_lines]


def test_a_signal_to_one_rank_stops_all_of_them_and_the_run_goes_on(recipe, tmp_path):
    command = pretrain(recipe, tmp_path, *LONG, "checkpoint.every_steps=null")
    ranks = start_two(command)
    until_step(tmp_path, 20)
    os.kill(pid_of(tmp_path, 1), signal.SIGUSR1)
    results = ended(*ranks)
    assert [result.status for result in results] == [75, 75]
    assert error_lines(results) == []
    stopped = json.loads((tmp_path / "stopped").read_text("utf-8"))
    step, saved = stopped["step"], find_latest_checkpoint(tmp_path / "checkpoints")
    assert stopped["signal"] == "SIGUSR1"
    assert read_manifest(saved).step == step
    line = f"stopped by SIGUSR1 at step {step}: saved {saved}; start the same command again"
    assert results[0].output.count(line) == 1

    # The same run in one process; another one cannot start in its folder meanwhile.
    again = start(command, place=0)
    until_step(tmp_path, step + 20)
    assert not (tmp_path / "stopped").exists()
    second = run(*command)
    assert second.status == 2
    (line,) = second.error_lines
    assert f"run.dir={tmp_path} is in use by another run" in line
    os.kill(pid_of(tmp_path, 0), signal.SIGTERM)
    (result,) = ended(again)
    assert result.status == 75
    assert f"resuming from {saved}" in result.output
    assert find_latest_checkpoint(tmp_path / "checkpoints") != saved


def press_ctrl_c(run_dir: Path, job: Process) -> None:
    """What a terminal does: the signal goes to all of the job's process group."""
    until_step(run_dir, 20)
    os.killpg(job.pid, signal.SIGINT)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_saves_and_the_run_goes_on(recipe, tmp_path, num_ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if num_ranks == 1:
        launcher = ["-c", HEARING_CTRL_C]
    command = [*launcher, *pretrain(recipe, tmp_path, *LONG, "checkpoint.every_steps=null")]
    job = start(command)
    press_ctrl_c(tmp_path, job)
    (result,) = ended(job)
    # torchrun has a status, and a traceback, of its own.
    assert result.status == (75 if num_ranks == 1 else 1)
    assert error_lines([result]) == []
    assert "KeyboardInterrupt" not in result.errors
    assert num_ranks == 2 or "Traceback" not in result.errors
    stopped = json.loads((tmp_path / "stopped").read_text("utf-8"))
    saved = find_latest_checkpoint(tmp_path / "checkpoints")
    assert (stopped["signal"], stopped["step"]) == ("SIGINT", read_manifest(saved).step)
    line = f"stopped by SIGINT at step {stopped['step']}: saved {saved}; start the same command"
    assert result.output.count(line) == 1
    assert result.output.count("Ctrl-C: saving and ending after this step") == 1

    again = start(command)
    until_step(tmp_path, stopped["step"] + 20)
    press_ctrl_c(tmp_path, again)
    (result,) = ended(again)
    assert f"resuming from {saved}" in result.output
    assert find_latest_checkpoint(tmp_path / "checkpoints") != saved


def test_a_rank_that_stands_still_ends_the_run_and_is_named(recipe, tmp_path):
    timeout_seconds = 8
    ranks = start_two(
        pretrain(recipe, tmp_path, *LONG, f"faults.hang_timeout_seconds={timeout_seconds}")
    )
    until_step(tmp_path, 20)
    stopped = pid_of(tmp_path, 1)
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    try:
        (first,) = ended(ranks[0])
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert first.status == 76
    assert timeout_seconds - 1 < time.monotonic() - since < timeout_seconds + 15
    table = [line for line in first.errors.splitlines() if re.match(r"rank +\d", line)]
    assert ["silent" in line for line in table] == [False, True]
    assert f"pid {stopped}" in table[1]
    assert "no progress for 8 s" in first.errors
    assert "in fit" in first.errors.partition("Stacks of rank 0:")[2]
    ended(ranks[1])


def test_a_killed_rank_ends_the_job_with_one_line(recipe, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = pretrain(recipe, tmp_path, *LONG, "checkpoint.every_steps=10")
    job = start([*launcher, *command])
    until_step(tmp_path, 20)
    os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
    since = time.monotonic()
    (result,) = ended(job)
    # The launcher would kill the survivor after 30 s.
    assert time.monotonic() - since < 20
    assert result.status == 1
    (line,) = result.error_lines
    assert re.match(r"error: rank 0: lost rank 1 at step \d+: a peer died", line)
    assert str(find_latest_checkpoint(tmp_path / "checkpoints")) in line
    # The launcher blames the rank that failed first.
    summary = result.errors.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", summary)
    assert "in fit" not in result.errors


def test_torchrun_starts_a_killed_run_again_and_not_one_that_was_stopped(recipe, tmp_path):
    # Not --standalone: without it torchrun keeps one store over all attempts.
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2"]
    overrides = ("checkpoint.every_steps=10", "checkpoint.resume=never")
    command = [*launcher, f"--master_port={free_port()}", *pretrain(recipe, tmp_path, *LONG)]
    job = start([*command, *overrides])
    until_step(tmp_path, 20)
    os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
    time.sleep(1)  # what the other rank has still written
    until_step(tmp_path, read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] + 20)
    os.kill(pid_of(tmp_path, 1), signal.SIGUSR1)
    (result,) = ended(job)
    assert result.status == 1
    assert result.output.count("; resuming from ") == 1
    saved = find_latest_checkpoint(tmp_path / "checkpoints")
    assert result.output.count(f"stopped by SIGUSR1 at step {read_manifest(saved).step}: ") == 1
    assert (tmp_path / "stopped").exists()
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_whose_launcher_has_ended_save_and_end_by_themselves(recipe, tmp_path, number):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = start([*launcher, *pretrain(recipe, tmp_path, *LONG)])
    until_step(tmp_path, 20)
    ranks = [psutil.Process(pid_of(tmp_path, rank)) for rank in range(2)]
    os.kill(ranks[0].ppid(), number)
    _, alive = psutil.wait_procs(ranks, TIMEOUT_SECONDS / 2)
    assert not alive
    (result,) = ended(job)
    assert result.status == -number
    saved = find_latest_checkpoint(tmp_path / "checkpoints")
    assert f"stopped by SIGHUP at step {read_manifest(saved).step}: " in result.output
    assert "Traceback" not in result.errors


def test_a_shard_truncated_under_a_run_is_one_line_with_file_and_byte(recipe, tmp_path):
    tree = yaml.safe_load(recipe.read_text("utf-8"))
    whole = Path(tree["data"]["train"][0]["path"])
    for file in whole.parent.glob(f"{whole.name}.*"):
        shutil.copy(file, tmp_path)
    shard = tmp_path / f"{whole.name}.bin"
    ranks = start_two(
        pretrain(recipe, tmp_path / "run", *LONG, f"data.train=[{{path: {tmp_path / whole.name}}}]")
    )
    until_step(tmp_path / "run", 20)
    os.truncate(shard, 100)
    results = ended(*ranks)
    assert [result.status for result in results] == [2, 2]
    (line,) = error_lines(results)
    assert re.match(rf"error: rank [01]: {re.escape(str(shard))} ends at byte \d+, within", line)
    assert "Traceback" not in results[0].errors + results[1].errors


def copied(recipe, folder: Path, split: str) -> Path:
    """The recipe's shards of a split, in a folder of the test's own."""
    whole = Path(yaml.safe_load(recipe.read_text("utf-8"))["data"][split][0]["path"])
    for file in whole.parent.glob(f"{whole.name}.*"):
        shutil.copy(file, folder)
    return folder / whole.name


def test_a_held_out_shard_truncated_under_a_run_costs_the_validation_alone(recipe, tmp_path):
    shards = copied(recipe, tmp_path, "valid")
    run_dir = tmp_path / "run"
    command = pretrain(
        recipe,
        run_dir,
        "schedule.steps=600",
        "checkpoint.every_steps=null",
        "validation.every_steps=300",
        f"data.valid=[{{path: {shards}}}]",
    )
    ranks = start_two(command)
    until_step(run_dir, 5)
    os.truncate(f"{shards}.bin", 100)
    results = ended(*ranks)
    assert [result.status for result in results] == [2, 2]
    saved = find_latest_checkpoint(run_dir / "checkpoints")
    assert read_manifest(saved).step == 600
    reason = rf"{re.escape(str(shards))}\.bin ends at byte \d+, within"
    for step in (300, 600):
        left_out = f"validation at step {step} was left out: "
        (line,) = re.findall(rf"^{left_out}.*", results[0].output, re.MULTILINE)
        assert re.match(rf"{left_out}{reason}", line)
    (line,) = error_lines(results)
    assert re.match(rf"error: rank [01]: validation at step 600 was left out: {reason}", line)
    assert "Traceback" not in results[0].errors + results[1].errors


def test_a_signal_is_heard_within_a_validation(recipe, tmp_path):
    settings = ["validation.num_samples=1000", "validation.draws_per_sample=500"]
    ranks = start_two(
        pretrain(recipe, tmp_path, *LONG, "validation.every_steps=30", *settings,
                 "checkpoint.every_steps=null")
    )  # fmt: skip
    until_step(tmp_path, 30)
    board = tmp_path / "ranks" / "rank-1.json"
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while json.loads(board.read_text("utf-8"))["place"] != "validating":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pid_of(tmp_path, 1), signal.SIGTERM)
    since = time.monotonic()
    results = ended(*ranks)
    # A launcher kills what has not ended after 30 s; the validation would take minutes.
    assert time.monotonic() - since < 25
    assert [result.status for result in results] == [75, 75]
    assert read_manifest(find_latest_checkpoint(tmp_path / "checkpoints")).step == 30
    assert "valid at step 30" not in results[0].output


@pytest.mark.parametrize("output", ["| head -n 1", "> /dev/full", "| cat"])
def test_what_becomes_of_its_output_does_not_end_a_run(output, recipe, tmp_path):
    command = shlex.join(map(str, [sys.executable, *pretrain(recipe, tmp_path / "run")]))
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; PYTHONIOENCODING=ascii {command} {output}"],
        cwd=REPO,
        env=environment_of_a_process(str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    saved = find_latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert read_manifest(saved).step == NUM_STEPS
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    if output == "| cat":
        assert warnings == []
        assert "valid at step 8 | nll" in result.stdout
        assert "\\xb1" in result.stdout
    else:
        (line,) = warnings
        assert line.startswith("warning: standard output cannot be written (")
    assert "Traceback" not in result.stderr


def test_a_run_that_diverges_skips_and_then_ends_without_saving(recipe, tmp_path):
    # The first update throws the weights out of float32.
    settings = ["optimizer.lr=1e30", "schedule.warmup_steps=0", "schedule.kind=constant"]
    settings += ["faults.max_skipped_steps=3", "validation.every_steps=null"]
    result = run(*pretrain(recipe, tmp_path, *settings, "checkpoint.every_steps=4"))
    assert result.status == 2
    (line,) = result.error_lines
    assert "The last 3 steps up to step 4 were skipped" in line
    skipped = r"step +(\d)/8 \| skipped \((?:loss|gradient norm) (?:nan|inf)\)"
    assert re.findall(skipped, result.output) == list("234")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["train/skipped_steps"] for record in records] == [0, 1, 2, 3]
    assert find_latest_checkpoint(tmp_path / "checkpoints") is None


def test_a_resumed_run_skips_the_same_spikes_bit_for_bit(recipe, tmp_path):
    settings = ["faults.loss_spike_factor=1.01", "schedule.steps=140", "validation.num_samples=2"]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=120"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = run(*pretrain(recipe, whole, *settings)).succeeded()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000140")
    (resumed / "checkpoints" / "latest").write_text("step_00000120\n")
    second = run(*pretrain(recipe, resumed, *settings)).succeeded()

    skipped = re.findall(r"step +(\d+)/140 \| skipped \(loss .* over 1.01 times", first.output)
    assert min(map(int, skipped)) > 100
    later = [step for step in skipped if int(step) > 120]
    assert 0 < len(later) < 20
    assert re.findall(r"step +(\d+)/140 \| skipped", second.output) == later
    left = CheckpointReader(find_latest_checkpoint(whole / "checkpoints"))
    right = CheckpointReader(find_latest_checkpoint(resumed / "checkpoints"))
    assert left.manifest.environment == right.manifest.environment
    assert left.manifest.skipped_steps == right.manifest.skipped_steps == len(skipped)
    for name in left.list_names():
        for kind in right.manifest.stored_kinds:
            assert torch.equal(left.load(name, kind), right.load(name, kind)), (name, kind)
