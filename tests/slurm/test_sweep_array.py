"""A sweep as a job array of a real SLURM: stopped, requeued, finished, not submitted again."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import yaml

from megatron_mdm.reporting.metrics import read_metrics
from megatron_mdm.studies.sweeps.grid import load_sweep
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import read_state

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300
# So many that a run is still training when the second task has started and SLURM's signal arrives.
NUM_STEPS = 400
QUIET = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def submit(cluster, file: Path, *options: str) -> str:
    command = (sys.executable, "tools/sweep.py", "submit", file, *options)
    return cluster.run(*command, **QUIET)


def states_of(file: Path) -> dict[str, str]:
    runs = size_runs(load_sweep(file).runs)
    return {run.name: read_state(run).status for run in runs}


def num_lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


def wait_until(condition, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.1)


def test_an_array_goes_on_after_preemption_and_time_limit(cluster, recipe, tmp_path):
    file, folder = tmp_path / "sweep.yaml", tmp_path / "runs"
    tree = {"base": str(recipe), "dir": str(folder), "set": {"schedule.steps": NUM_STEPS}}
    file.write_text(yaml.safe_dump({**tree, "axes": {"run.seed": [0, 1]}}))
    said = submit(cluster, file, "--cpus-per-task=2", "--at-once", "2")
    job = said.split()[0]
    assert said == f"{job} submitted with 2 runs"
    assert (folder / "_slurm/1.txt").read_text() == "seed-0\nseed-1\n"

    runs = [folder / f"seed-{seed}" for seed in (0, 1)]
    logs = [folder / f"_slurm/1-{task}.log" for task in (1, 2)]
    for run, log in zip(runs, logs, strict=True):
        wait_until(lambda run=run: num_lines(run) > 2, log)
    assert states_of(file) == {"seed-0": "running", "seed-1": "running"}
    cluster.run("scontrol", "requeue", f"{job}_1")
    # What SLURM sends near the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    stopped = [run / "stopped" for run in runs]
    wait_until(lambda: all(file.exists() for file in stopped), logs[0])
    wait_until(lambda: not any(file.exists() for file in stopped), logs[0])
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG"), logs[0])

    assert states_of(file) == {"seed-0": "done", "seed-1": "done"}
    for task, (run, log) in enumerate(zip(runs, logs, strict=True), start=1):
        assert [one["step"] for one in read_metrics(run / "metrics.jsonl")] == [
            *range(1, NUM_STEPS + 1)
        ]
        assert f"start 2: {run.name}" in log.read_text()
        # Each for itself: the last task has the number of the whole array.
        assert "pending execution" not in log.read_text()
        assert ("not finished: requeued" in log.read_text()) == (task == 2)
        assert cluster.field(f"{job}_{task}", "Restarts") == "1"
    assert submit(cluster, file).endswith("nothing to submit: 2 done")


def test_a_task_that_is_not_requeued_says_what_goes_on(cluster, tmp_path):
    names, python = tmp_path / "names.txt", tmp_path / "python"
    names.write_text("seed-0\n")
    python.write_text("#!/bin/sh\nexit 75\n")
    python.chmod(0o755)
    options = ("--no-requeue", "--export=NONE", "--array=1", f"--output={tmp_path}/log")
    job = cluster.run(
        *("sbatch", "--parsable", *options, REPO / "pretrain/slurm/sweep.sbatch", names),
        *(python, "tools/sweep.py", "run", "a sweep.yaml"),
        cwd=tmp_path,
    )
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG"), names)
    assert cluster.field(f"{job}_1", "ExitCode") == "75:0"
    *_, refusal, line = (tmp_path / "log").read_text().splitlines()
    assert "not finished: seed-0 is saved, and SLURM does not requeue the task: " in refusal
    command = f"cd {tmp_path} && {python} tools/sweep.py submit a\\ sweep.yaml"
    assert line == f"to go on, with the options of sbatch that you gave: {command}"


def test_preprocessing_starts_from_elsewhere_without_variables(cluster, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "some words"}\n')
    options = ("--export=NONE", "--array=0", f"--output={tmp_path}/log")
    job = cluster.run(
        *("sbatch", "--parsable", *options, REPO / "tools/slurm/preprocess.sbatch"),
        *("--input", "corpus.jsonl", "--tokenizer", "./missing", "--output-prefix", "data/web"),
        cwd=tmp_path,
    )
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG"), tmp_path)
    # It reads the corpus beside the submitter; only the tokenizer is not there.
    assert cluster.field(f"{job}_0", "ExitCode") == "2:0"
    (line,) = [one for one in (tmp_path / "log").read_text().splitlines() if "error" in one]
    assert line.startswith("error: ")
    assert "missing" in line
