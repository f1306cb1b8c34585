"""Runs as jobs: TP 2 x DP 2 on two nodes with two processes each."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_mdm.reporting.metrics import read_metrics

LOSS, GRAD_NORM, LR = "train/loss_nats_per_token", "train/grad_norm", "train/lr"
LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TIMEOUT_SECONDS = 300
QUIET = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


def submit(cluster, recipe, folder: Path, *overrides: str, options=(), **variables: str) -> str:
    """Submits the script with its logs in the run's parent folder; returns the job's number."""
    return cluster.run(
        *("sbatch", "--parsable", "--nodes=2", f"--output={folder.parent}/job-%j.log", *options),
        *("pretrain/slurm/pretrain.sbatch", recipe, f"run.dir={folder}", *overrides),
        PROCESSES_PER_NODE="2",
        NODE_LOG=f"{folder.parent}/job-%j-node%n.log",
        **QUIET,
        **variables,
    )


def wait_for(cluster, job: str, *states: str) -> str:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if (state := cluster.field(job, "JobState")) in states:
            return state
        time.sleep(0.2)
    raise AssertionError(f"job {job} is {state} after {TIMEOUT_SECONDS} s")


def wait_for_steps(run_dir: Path, number: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    file = run_dir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, f"{file} does not get {number} lines"
        time.sleep(0.05)


def log_of(run_dir: Path, job: str, suffix: str = "") -> str:
    return (run_dir.parent / f"job-{job}{suffix}.log").read_text()


def curve(run_dir: Path) -> list[list[float]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [[record[name] for name in ("step", LOSS, GRAD_NORM, LR)] for record in records]
